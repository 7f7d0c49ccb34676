"""Scores that can be checked by hand, fair splits of contexts, and readings equal to plain forward passes."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from sae.explanations import evidence as plan
from sae.explanations import explain, prompts
from sae.samples import RANDOM, SPREAD, TOP, Samples
from sae.tokens import open_dataset


def test_correlation_joins_all_tokens_of_all_contexts():
    x, y = torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[0.0, 2.0], [4.0, 6.0]])
    assert explain.correlation(x, y) == pytest.approx(1)
    # Each context alone correlates perfectly, the two together do not.
    assert (
        explain.correlation(torch.tensor([[0.0, 1.0], [5.0, 6.0]]), torch.tensor([[5.0, 6.0], [0.0, 1.0]]))
        < 0
    )
    # By hand: x - mean = (-1, 0, 1), y - mean = (-2, 1, 1): 3 / sqrt(2 * 6).
    values = explain.correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 3.0, 3.0]))
    assert values == pytest.approx(3 / math.sqrt(12))


def test_a_constant_side_has_no_correlation():
    assert explain.correlation(torch.ones(4), torch.arange(4.0)) is None
    assert explain.correlation(torch.arange(4.0), torch.zeros(4)) is None


def test_the_interval_is_what_drawing_contexts_one_by_one_gives():
    rng = torch.Generator().manual_seed(1)
    x_CT = torch.rand(5, 8, generator=rng)
    y_CT = x_CT + torch.rand(5, 8, generator=rng)
    drawn = torch.randint(5, (explain.BOOTSTRAPS, 5), generator=torch.Generator().manual_seed(7))
    slow = torch.tensor([explain.correlation(x_CT[draw], y_CT[draw]) for draw in drawn], dtype=torch.float64)
    bounds = slow.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert explain.interval(x_CT, y_CT, 7) == pytest.approx(bounds, abs=1e-9)
    assert explain.interval(torch.zeros(3, 4), torch.rand(3, 4), 0) is None


def test_expected_and_contrastive_readings_by_hand():
    p = torch.full((1, 1, 10), 0.05)
    p[..., 0], p[..., 9] = 0.1, 0.5  # non-zero: 0.9
    assert explain.simulated(p.log()).item() == pytest.approx(0.05 * 36 + 9 * 0.5)
    neutral = torch.full((1, 1, 10), 0.1)  # non-zero: 0.9 as well, so the explanation says nothing
    nothing = explain.simulated(p.log(), neutral.log()).item()
    assert nothing == pytest.approx(1 / (1 + math.exp(explain.THRESHOLD)), rel=1e-4)
    neutral[..., 0], neutral[..., 1:] = 0.9, 0.1 / 9
    assert explain.simulated(p.log(), neutral.log()).item() > nothing


def test_contexts_are_dealt_in_turn_and_no_document_serves_twice():
    kind = [TOP] * 6 + [SPREAD] * 2 + [RANDOM] * 4
    rows, peak = list(range(12)), [9, 8, 7, 6, 5, 4, 3, 2, 0, 0, 1, 0]
    document = [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11]  # the first random one shares a document with the top
    found = plan.roles(kind, rows, peak, document, num_shown=2, num_scored=2)
    assert found == plan.Roles([0, 2], [], [1, 3, 9, 10])
    found = plan.roles(kind, rows, peak, document, num_shown=2, num_scored=1, num_judging=1)
    assert found.judging[0] == 1 and found.scored == [2, 10] and found.judging == [1, 9]
    assert found.shown[:2] == [0, 3] and set(found.shown) == {0, 3, 4, 5, 6, 7}
    used = [[document[k] for k in places] for places in found]
    assert not set(used[0]) & set(used[1]) | set(used[0]) & set(used[2]) | set(used[1]) & set(used[2])


def test_missing_rows_and_silent_contexts_are_never_shown():
    found = plan.roles([TOP, TOP, TOP, RANDOM], [5, 6, -1, -1], [3, 0, 0, 0], [1, 2, 0, 0], 2, 2)
    assert found == plan.Roles([0], [], [])


def test_selections_begin_with_the_strongest_and_differ():
    first, *others = plan.selections([4, 2, 7, 1, 9, 3], 2, 4, seed="0 17")
    assert first == [4, 2]
    assert all(len(set(other)) == 2 for other in others)
    assert [first, *others] == plan.selections([4, 2, 7, 1, 9, 3], 2, 4, seed="0 17")
    assert len({tuple(other) for other in others}) > 1


def test_groups_leave_no_feature_without_another_to_control_it():
    assert plan.groups([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4, 5]]
    assert plan.groups([1], 4) == [[1]]


class Reader:
    """An interpreter that reads a token's number off the explanation: it writes down what it is asked."""

    def __init__(self):
        self.asked = []

    def explanations(self, questions):
        return ["import" if "import\t10" in question else "def" for question in questions]

    def readings(self, explanation, contexts, batch_size):
        self.asked.append((explanation, len(contexts)))
        return torch.stack(
            [
                torch.stack([_peaked(9 if token.strip("·") == explanation else 0) for token in tokens])
                for tokens in contexts
            ]
        )


def _peaked(digit):
    p = torch.full((10,), 0.01)
    p[digit] = 0.91
    return p.log()


def feature(dim, word):
    texts = [["x", f" {word}", " y"], ["def", " import", " z"], [word, "a", "b"]]
    contexts = [
        plan.Context(10 * dim + row, text, torch.tensor([2.0 * (t.strip() == word) for t in text]))
        for row, text in enumerate(texts)
    ]
    return plan.Feature(dim, -1.5, 2.0, contexts[:1], [], contexts[1:])


def test_right_explanations_score_high_and_controls_low():
    reader = Reader()
    one, two = explain.explain_group([feature(1, "import"), feature(2, "def")], reader)
    assert (one["interpretation"], two["interpretation"]) == ("import", "def")
    assert (one["control_dim"], two["control_dim"]) == (2, 1)
    assert one["score"] == two["score"] == 1.0
    assert one["control"] < 0 and one["score_reason"] is None
    assert one["tokens"] == ["import"] and one["examples"] == ["x« import» y", "def« import» z", "«import»ab"]
    # One pass for each explanation: over its own contexts and those it controls.
    assert reader.asked == [("import", 4), ("def", 4)]


def test_a_feature_alone_has_no_control_and_a_silent_one_no_score():
    (alone,) = explain.explain_group([feature(1, "import")], Reader())
    assert alone["control"] is None and alone["control_dim"] is None and alone["score"] == 1.0
    assert "no other feature" in alone["control_reason"]
    assert "1 features explained: median score 1.00; 1 in" in explain.summary([alone], 1, 1.0)
    silent = feature(3, "nowhere")
    (document,) = explain.explain_group([silent._replace(scored=silent.scored[1:2])], Reader())
    assert document["score"] is None  # Reader explains "def", the context fires on `nowhere` alone
    silent = silent._replace(shown=[], scored=[])
    (document,) = explain.explain_group([silent], Reader())
    assert document["score"] is None and "no explanation" in document["score_reason"]


def test_of_several_explanations_the_one_that_simulates_best_is_kept():
    good = feature(1, "import")
    misleading = plan.Context(99, ["def", "x"], torch.tensor([2.0, 0.0]))
    several = good._replace(shown=[misleading, *good.shown], judging=good.scored[:1])
    assert explain.explain_group([several], Reader(), num_shown=1)[0]["interpretation"] == "def"
    kept = explain.explain_group([several], Reader(), num_shown=1, num_explanations=8)[0]
    assert kept["interpretation"] == "import"


def test_a_context_is_read_under_the_neutral_explanation_once_and_always_in_the_same_company():
    visible = {row: ["x", "y"] for row in range(6)}
    orders = ([[3], [0, 1], [0, 4]], [[0, 4], [3], [0, 1]])
    for order in orders:
        reader = Reader()
        neutral = explain.NeutralReadings(reader, [[0, 1], [1, 2, 0], [3, 4, 3]], visible.get, 8)
        for rows in order:
            assert neutral(rows).shape == (len(rows), 2, 10)
        assert sorted(reader.asked) == [(prompts.NEUTRAL, 2), (prompts.NEUTRAL, 2)]


def test_the_summary_counts_what_beats_its_control():
    documents = [{"score": s, "control": c} for s, c in ((0.5, 0.1), (0.1, 0.2), (None, None), (0.3, 0.0))]
    said = explain.summary(documents, 2, 60.0)
    assert "4 features explained: median score 0.30, median control 0.10, 67% beat" in said
    assert "2 in 60 s, 2.0 features/minute" in said
    assert "no score is defined" in explain.summary(documents[2:3], 1, 1.0)


def test_skipped_positions_are_neither_shown_nor_scored(small_dataset, smollm2):
    dataset, _ = open_dataset(small_dataset)
    acts = torch.zeros(1, 4, 64)
    acts[..., 10] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    samples = Samples(
        {"skip_positions": 3}, "", "", 1, torch.zeros(1), torch.tensor([0]), torch.tensor([4.0]),
        torch.tensor([[0, 2, 4, 6]]), acts.half(), torch.full((1, 4), TOP, dtype=torch.int8),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    made = plan.Plan(plan.Material(samples, dataset, tokenizer, ""), 2, 2, 1, 8)
    one = made.feature(0)
    assert [context.row for context in one.shown] == [0, 4] and [c.row for c in one.scored] == [2, 6]
    whole = prompts.token_texts(tokenizer, dataset[0]["input_ids"])
    assert one.shown[0].texts == whole[3:] and one.shown[0].values_T.tolist()[7] == 4.0
