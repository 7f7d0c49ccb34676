"""Scores that can be checked by hand."""

import math

import pytest
import torch

from sae.explanations import prompts, scoring
from sae.explanations.evidence import Context, Feature


def test_correlation_joins_all_tokens_of_all_contexts():
    x, y = torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[0.0, 2.0], [4.0, 6.0]])
    assert scoring.correlation(x, y) == pytest.approx(1)
    # Each context alone correlates perfectly, the two together do not.
    x, y = torch.tensor([[0.0, 1.0], [5.0, 6.0]]), torch.tensor([[5.0, 6.0], [0.0, 1.0]])
    assert scoring.correlation(x, y) < 0
    # By hand: x - mean = (-1, 0, 1), y - mean = (-2, 1, 1): 3 / sqrt(2 * 6).
    value = scoring.correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 3.0, 3.0]))
    assert value == pytest.approx(3 / math.sqrt(12))


def test_a_constant_side_has_no_correlation_and_the_reason_names_it():
    assert scoring.correlation(torch.ones(4), torch.arange(4.0)) is None
    assert scoring.correlation(torch.arange(4.0), torch.zeros(4)) is None
    silent, fires = (Context(0, ["a", "b"], torch.tensor(values)) for values in ([0.0, 0.0], [0.0, 2.0]))
    simulated_CT = torch.tensor([[0.0, 1.0]])
    fields = scoring.scored(simulated_CT, [silent], 0)
    assert fields == {"score": None, "score_reason": fields["score_reason"], "interval": None}
    assert "the feature is constant" in fields["score_reason"]
    fields = scoring.compared("control", torch.ones(1, 2), [fires])
    assert fields["control"] is None and "the simulation is constant" in fields["control_reason"]
    fields = scoring.scored(simulated_CT, [fires], 0)
    assert fields["score"] == 1.0 and fields["score_reason"] is None


def test_the_interval_is_what_drawing_contexts_one_by_one_gives():
    rng = torch.Generator().manual_seed(1)
    x_CT = torch.rand(5, 8, generator=rng)
    y_CT = x_CT + torch.rand(5, 8, generator=rng)
    drawn = torch.randint(5, (scoring.BOOTSTRAPS, 5), generator=torch.Generator().manual_seed(7))
    slow = torch.tensor([scoring.correlation(x_CT[draw], y_CT[draw]) for draw in drawn], dtype=torch.float64)
    bounds = slow.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert scoring.interval(x_CT, y_CT, 7) == pytest.approx(bounds, abs=1e-9)
    assert scoring.interval(torch.zeros(3, 4), torch.rand(3, 4), 0) is None
    contexts = [Context(0, ["x"] * 8, y_T) for y_T in y_CT]
    assert scoring.scored(x_CT, contexts, 7)["interval"] == pytest.approx(bounds, abs=1e-4)
    # Of three contexts one fires: draws without it say nothing, all others correlate perfectly.
    one_CT = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert scoring.interval(one_CT, 2 * one_CT, 0) == pytest.approx([1.0, 1.0])


def test_counting_looks_up_the_mean_activation_of_a_token_and_of_an_unseen_one_nothing():
    shown = [
        Context(0, ["a", "b", "a"], torch.tensor([3.0, 0.0, 0.0])),
        Context(1, ["b", " a", "c"], torch.tensor([4.0, 2.0, 0.0])),
    ]
    found_CT = scoring.looked_up(shown, [Context(2, ["a", "b", " a", "new"], torch.zeros(4))])
    assert found_CT.tolist() == [[1.5, 2.0, 2.0, 0.0]]


def test_auroc_by_hand():
    # Of the six pairs four are in order and one is a tie.
    value = scoring.auroc(torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert value == pytest.approx((3 + 1 + 0.5) / 6)
    assert scoring.auroc(torch.ones(3), torch.zeros(4)) == 1.0


def contexts(count, fires):
    values = torch.tensor([0.0, 2.0 * fires, 0.0])
    return [Context(row, ["x", " import" if fires else " y", " z"], values) for row in range(count)]


def test_detection_and_fuzzing_ask_of_texts_and_marks():
    """An oracle of yes and no: it knows the word, and sees marks as they are."""
    asked = []

    def yes(explanation, question, texts):
        asked.append((explanation, question, texts))
        right = [
            (" import" in text) if question == scoring.FIRES else ("« import»" in text) for text in texts
        ]
        return torch.tensor([1.0 if fine else -1.0 for fine in right])

    feature = Feature(5, -2.0, 2.0, [], [], contexts(12, True) + contexts(12, False), contexts(4, False))
    fields = scoring.yes_no(feature, "the word import", yes, seed=0)
    assert (fields["detection"], fields["fuzzing"]) == (1.0, 1.0)
    (_, _, texts), (explanation, question, marked) = asked
    assert explanation == "the word import" and question == scoring.MARKED
    assert len(texts) == 10 + 10 and len(marked) == 10 + 10
    assert all(text.count("«") == text.count("»") == 1 for text in marked)
    fields = scoring.yes_no(feature._replace(scored=contexts(9, True)), "the word import", yes, seed=0)
    assert fields["detection"] is None and "9 and 4" in fields["detection_reason"]
    assert fields["fuzzing"] is None and "9 and 9" in fields["fuzzing_reason"]


def test_hard_contexts_are_asked_about_before_random_ones():
    hard = [context._replace(texts=["hard", "er", "!"]) for context in contexts(4, False)]
    feature = Feature(5, -2.0, 2.0, [], [], contexts(10, True) + contexts(12, False), hard)
    seen = []
    scoring.yes_no(feature, "x", lambda _e, _q, texts: seen.extend(texts) or torch.zeros(len(texts)), 0)
    assert seen[10:14] == ["harder!"] * 4 and len(seen[:20]) == 20


def test_of_long_texts_what_stands_around_the_peak_is_asked_about():
    values = torch.zeros(64)
    values[40] = 1.0
    firing = [Context(row, [chr(200 + i) for i in range(64)], values) for row in range(10)]
    silent = [context._replace(values_T=torch.zeros(64)) for context in firing]
    feature, seen = Feature(5, -2.0, 2.0, [], [], firing + silent, []), []
    scoring.yes_no(feature, "x", lambda _e, _q, texts: seen.extend(texts) or torch.zeros(len(texts)), 0)
    assert [len(text) for text in seen] == [scoring.YES_TOKENS] * 20 + [scoring.YES_TOKENS + 2] * 20
    assert chr(240) in seen[0] and f"«{chr(240)}»" in seen[20]


def test_marks_of_fuzzing_are_as_many_and_never_right():
    values = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    firing = [Context(row, list("abcdef"), values) for row in range(10)]
    marked = []
    feature = Feature(5, -2.0, 2.0, [], [], firing, [])
    scoring.yes_no(feature, "x", lambda _e, _q, texts: marked.extend(texts) or torch.zeros(len(texts)), 0)
    right = prompts.excerpt(list("abcdef"), [False, True, True, False, False, False])
    assert marked[:10] == [right] * 10
    for text in marked[10:]:
        assert text.count("«") == 2 and "«b»" not in text and "«c»" not in text
    assert len(set(marked[10:])) > 3  # drawn, with the run's seed
    before = marked.copy()
    scoring.yes_no(feature, "x", lambda _e, _q, texts: marked.extend(texts) or torch.zeros(len(texts)), 1)
    assert marked[10:20] != marked[len(before) + 10 :]
