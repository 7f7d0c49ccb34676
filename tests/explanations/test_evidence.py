"""Which contexts serve what: fair splits, no document twice, what a document says of a context."""

import pytest
import torch
from transformers import AutoTokenizer

from sae import InputError
from sae.explanations import evidence, prompts
from sae.explanations.evidence import Context, Roles, evenly, fired_on, roles
from sae.explanations.explain import Settings
from sae.samples import RANDOM, SPREAD, TOP, Samples
from sae.tokens import open_dataset


def test_contexts_are_dealt_in_turn_and_no_document_serves_twice():
    kind = [TOP] * 6 + [SPREAD] * 2 + [RANDOM] * 4
    rows, peak = list(range(12)), [9, 8, 7, 6, 5, 4, 3, 2, 0, 0, 1, 0]
    document = [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11]  # the first random one shares a document with the top
    found = roles(kind, rows, peak, document, num_shown=2, num_scored=2)
    assert found == Roles([0, 2], [], [1, 3, 9, 10])
    found = roles(kind, rows, peak, document, num_shown=8, num_scored=1, num_judging=1)
    assert found == Roles([0, 3, 4, 5, 6, 7], [1, 9], [2, 10])


def test_spread_contexts_fill_up_where_the_top_ones_do_not_do():
    kind, rows, document = [TOP, TOP, SPREAD, SPREAD, SPREAD], list(range(5)), list(range(5))
    assert roles(kind, rows, [5, 4, 3, 2, 1], document, num_shown=2, num_scored=3).scored == [1, 2, 4]
    assert roles(kind, rows, [5, 4, 3, 2, 0], document, num_shown=3, num_scored=1) == Roles(
        [0, 2, 3], [], [1]
    )


def test_missing_rows_and_silent_contexts_are_never_shown():
    found = roles([TOP, TOP, TOP, RANDOM], [5, 6, -1, -1], [3, 0, 0, 0], [1, 2, 0, 0], 2, 2)
    assert found == Roles([0], [], [])


def test_evenly_takes_first_and_last():
    assert evenly([5, 4, 3, 2, 1], 3) == [5, 3, 1]
    assert evenly([2, 1], 3) == [2, 1]
    assert evenly(list(range(100)), 12)[0] == 0 and evenly(list(range(100)), 12)[-1] == 99


def test_a_context_is_cut_around_its_peak_within_its_ends():
    texts = list("abcdefghij")
    for peak, cut in ((0, "abcd"), (5, "defg"), (9, "ghij")):
        values = torch.zeros(10)
        values[peak] = 2.0
        part = Context(3, texts, values).around_peak(4)
        assert "".join(part.texts) == cut and part.values_T.max() == 2.0
        assert part.texts[int(part.values_T.argmax())] == texts[peak]
    assert Context(3, texts, values).around_peak(64).texts == texts


def test_marks_are_places_in_the_text_whatever_it_holds():
    one = Context(7, ["a «", "import", " »b", "c"], torch.tensor([0.0, 2.0, 1.0, 0.0])).document()
    assert one == {"row": 7, "text": "a «import »bc", "marks": [[3, 9], [9, 12]]}
    assert [one["text"][start:end] for start, end in one["marks"]] == ["import", " »b"]


def test_tokens_are_listed_strongest_first_and_once():
    contexts = [
        Context(0, ["a", " b", "c"], torch.tensor([1.0, 2.0, 0.0])),
        Context(1, ["a", "\n", "a"], torch.tensor([3.0, 0.5, 1.0])),
    ]
    assert fired_on(contexts) == ["a", "b", "\\n"]


@pytest.fixture(scope="module")
def made(small_dataset, smollm2):
    """Makes Plans of two features of four contexts; one fires on tokens 10 to 13, the other on token 10."""
    dataset, _ = open_dataset(small_dataset)
    acts = torch.zeros(2, 4, 64)
    acts[0, :, 10:14] = torch.tensor([4.0, 3.0, 2.0, 1.0])[:, None]
    acts[1, :, 10] = 1.0
    samples = Samples(
        {"skip_positions": 3}, "", "", 1, torch.arange(9.0), torch.tensor([4, 8]), torch.tensor([4.0, 1.0]),
        torch.tensor([[0, 2, 4, 6]] * 2), acts.half(), torch.full((2, 4), TOP, dtype=torch.int8),
        promoted=torch.tensor([[28, 198], [42, 5]]), suppressed=torch.tensor([[1, 2], [3, 4]]),
        hard_rows=torch.tensor([[8, -1], [-1, -1]]),
    )  # fmt: skip
    material = evidence.Material(samples, dataset, AutoTokenizer.from_pretrained(smollm2), "")
    return lambda *more, **chosen: evidence.Plan(
        material, Settings(num_interpretation_samples=2, num_simulation_samples=2)._replace(**chosen), *more
    )


def test_skipped_positions_are_neither_shown_nor_scored(made, small_dataset, smollm2):
    one = made(num_explanations=1).feature(0)
    assert [context.row for context in one.shown] == [0, 4] and [c.row for c in one.scored] == [2, 6]
    row = open_dataset(small_dataset)[0][0]["input_ids"]
    whole = prompts.token_texts(AutoTokenizer.from_pretrained(smollm2), row)
    assert one.shown[0].texts == whole[3:] and one.shown[0].values_T.tolist()[7] == 4.0


def test_contexts_of_a_feature_are_cut_to_what_is_asked_for(made):
    one = made(context_tokens=8).feature(1)
    assert {len(context.texts) for context in (*one.shown, *one.judging, *one.scored)} == {8}
    assert all(context.values_T.max() == 1.0 for context in one.shown)
    assert (one.dim, one.log10_frequency, one.max_activation) == (8, 8.0, 1.0)


def test_hard_contexts_are_silent_and_only_those_there_are(made):
    first, second = made().feature(0), made().feature(1)
    assert [context.row for context in first.hard] == [8] and second.hard == []
    assert first.hard[0].values_T.max() == 0


def test_judging_takes_contexts_only_where_there_is_something_to_choose(made):
    assert made(num_explanations=1).feature(0).judging == []
    assert len(made(num_explanations=2).feature(0).judging) > 0


def test_what_a_feature_does_is_said_in_tokens(made, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    said = {"promotes": [28, 198], "suppresses": [1, 2]}
    said = {field: prompts.token_texts(tokenizer, ids) for field, ids in said.items()}
    assert made().effects(0) == {field: list(map(prompts.typed, texts)) for field, texts in said.items()}


def test_a_plan_holds_the_features_asked_for_in_groups(made):
    assert made(batch_size=1).groups == [[0], [1]] and made().groups == [[0, 1]]
    assert made((8,)).groups == [[1]] and made((), 1).groups == [[0]]
    assert made().pending({4}) == [0] and made().pending({4, 8}) == []
    assert made(batch_size=1).pending({4}) == [1]
    assert made().others(1) == [0] and made((8,)).others(1) == [0]  # also those that are not asked for
    with pytest.raises(InputError, match="5"):
        made((5,))
