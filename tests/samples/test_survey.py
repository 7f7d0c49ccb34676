import math

import pytest
import torch

from sae import InputError
from sae.samples import RANDOM, SPREAD, TOP, Survey, in_band, nearest, wider_band

TOP_6, SPREAD_12, RANDOM_4 = 6, 12, 4


class Width:
    """All that a Survey asks of an autoencoder."""

    def __init__(self, features):
        self.b_enc = torch.zeros(features)


def survey_of(f_NTF, documents_N, nums=(TOP_6, SPREAD_12, RANDOM_4), seed=0, batch=7, block=50, order=None):
    """A Survey that has seen the contexts, in the order given, and keeps them a few at a time."""
    rng = torch.Generator().manual_seed(seed)
    survey = Survey(Width(f_NTF.shape[2]), documents_N, *nums, rng)
    survey.block = block
    for contexts_B in (torch.arange(len(f_NTF)) if order is None else order).split(batch):
        survey.add(contexts_B, f_NTF[contexts_B])
    return survey


def choice_of(survey, features, rows_FD=None):
    features_F = torch.tensor(features)
    return survey.choose(features_F, torch.eye(len(survey.count_F)) if rows_FD is None else rows_FD)


def chosen(survey, features):
    """Per feature the lists of its top, spread and random contexts, without the missing."""
    choice = choice_of(survey, features)
    kinds = [kind for kind, num in zip((TOP, SPREAD, RANDOM), survey.nums, strict=True) for _ in range(num)]
    assert choice.kind_FK[0].tolist() == kinds
    parts = choice.contexts_FK.split(survey.nums, 1)
    return [[[n for n in row.tolist() if n >= 0] for row in rows] for rows in zip(*parts, strict=True)]


def step_of(value, maximum):
    """How many steps lie between: of two to an octave, with the eighths of an octave rounded as they are."""
    cell = [math.frexp(v)[1] * 8 + math.floor(math.frexp(v)[0] * 16) for v in (value, maximum)]
    return (cell[1] - cell[0]) // 4


SHAPES = {
    "even": lambda v: v,
    "mostly low": lambda v: v**6,
    "often silent": lambda v: torch.relu(v - 0.9),
    "ties": lambda v: (v * 8).round() / 8,
    "a cliff": lambda v: torch.where(v < 0.8, v * 0.05, 0.8 + v * 0.2),
    "growing": lambda v: v * torch.linspace(0.01, 1, len(v))[:, None, None],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("documents", ["one context each", "several contexts"])
def test_top_is_exact_and_spread_takes_each_step(shape, documents):
    rng = torch.Generator().manual_seed(1)
    f_NTF = SHAPES[shape](torch.rand(800, 2, 4, generator=rng))
    several = torch.randint(0, 300, (800,), generator=rng)  # in no order: a document ends anywhere
    documents_N = torch.randperm(800, generator=rng) if documents == "one context each" else several
    for feature, (top, spread, random) in enumerate(chosen(survey_of(f_NTF, documents_N), range(4))):
        value_N = f_NTF[:, :, feature].amax(1).tolist()
        order = sorted((n for n in range(800) if value_N[n] > 0), key=lambda n: (-value_N[n], n))
        used, best = set(documents_N[random].tolist()), []
        for n in order:
            if len(best) < TOP_6 and documents_N[n].item() not in used:
                best.append(n)
                used.add(documents_N[n].item())
        assert top == best and len(random) == RANDOM_4
        of_all = documents_N[top + spread + random].tolist()
        assert len(set(of_all)) == len(of_all)
        assert spread == sorted(spread, key=lambda n: -value_N[n])
        maximum = value_N[order[0]]
        steps = [step_of(value_N[n], maximum) for n in spread]
        assert all(0 <= step < SPREAD_12 for step in steps)
        free = [n for n in order if documents_N[n].item() not in used]
        crowded = [s for s in range(SPREAD_12) if sum(step_of(value_N[n], maximum) == s for n in free) >= 40]
        if documents == "one context each":  # else those drawn in a step may be of documents of others
            assert set(crowded) <= set(steps), (steps, crowded)


def test_spread_contexts_fill_up():
    # Maxima of real features are skewed like this: most contexts lie far below the maximum.
    rng = torch.Generator().manual_seed(2)
    f_NF = torch.randn(3000, 100, generator=rng).exp() * (torch.rand(3000, 100, generator=rng) < 0.1)
    documents_N = torch.arange(3000) // 3
    survey = survey_of(f_NF[:, None], documents_N, (24, 12, 16), block=256, batch=64)
    slots = steps = possible = 0
    for feature, (top, spread, random) in enumerate(chosen(survey, range(100))):
        value_N = f_NF[:, feature].tolist()
        used = set(documents_N[top + random].tolist())
        free = [n for n in range(3000) if value_N[n] > 0 and documents_N[n].item() not in used]
        step = {n: step_of(value_N[n], max(value_N)) for n in free}
        slots += len(spread)
        steps += len({step[n] for n in spread})
        possible += len({s for s in step.values() if s < 12})
    assert slots >= 0.99 * 12 * 100 and steps >= 0.95 * possible, (slots, steps, possible)


def test_results_depend_on_no_order_and_no_company():
    rng = torch.Generator().manual_seed(2)
    f_NTF, documents_N = torch.rand(500, 2, 6, generator=rng) ** 3, torch.arange(500) // 3
    wanted = chosen(survey_of(f_NTF, documents_N), range(6))
    assert chosen(survey_of(f_NTF, documents_N, batch=500), range(6)) == wanted
    assert chosen(survey_of(f_NTF, documents_N, batch=1, block=256), range(6)) == wanted
    shuffled = torch.randperm(500, generator=rng)
    assert chosen(survey_of(f_NTF, documents_N, order=shuffled), range(6)) == wanted
    assert chosen(survey_of(f_NTF, documents_N, seed=1), range(6)) != wanted
    assert [chosen(survey_of(f_NTF, documents_N), [f])[0] for f in range(6)] == wanted
    parts = [survey_of(f_NTF, documents_N, order=part) for part in (shuffled[:123], shuffled[123:])]
    parts[1].merge(*parts[0].state())
    assert chosen(parts[1], range(6)) == wanted and parts[1].tokens == 1000
    assert torch.equal(parts[1].log10_frequency(), survey_of(f_NTF, documents_N).log10_frequency())


def test_draws_are_fair_wherever_the_maximum_comes():
    # 20 contexts share a step, the maximum comes last: each must win a twentieth of 2,000 draws.
    value = torch.cat([torch.linspace(0.30, 0.31, 20), torch.linspace(0.05, 0.1, 60), torch.tensor([1.0])])
    f_NTF = value[:, None, None].expand(-1, 1, 1000).contiguous()
    wins = torch.zeros(20)
    for seed in range(2):
        survey = survey_of(f_NTF, torch.arange(81), (1, 4, 1), seed=seed, block=16)
        spread = choice_of(survey, range(1000)).contexts_FK[:, 1:5]
        wins += torch.bincount(spread[(spread >= 0) & (spread < 20)], minlength=20)
    share = wins / wins.sum()
    assert wins.sum() > 1900  # the others have it among their random ones, or as their maximum
    assert ((share - 1 / 20) ** 2 * 20 * wins.sum()).sum() < 43.8  # chi squared, 19 degrees, p = 0.001


def test_a_new_maximum_far_above_forgets_what_lies_below_the_steps():
    f_NTF = torch.cat([torch.linspace(0.001, 0.01, 60), torch.tensor([3000.0, 1000.0, 900.0])])[:, None, None]
    (((top, spread, _)),) = chosen(survey_of(f_NTF, torch.arange(63), (1, 12, 1)), [0])
    assert set(top + spread) <= {60, 61, 62}


@pytest.mark.parametrize("per_document", [1, 20])
def test_random_contexts_fire_as_often_as_all(per_document):
    # Documents are of a subject: a feature fires in a tenth of them, there in every other context.
    rng = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 2 * per_document, (400,), generator=rng) if per_document > 1 else None
    documents_N = torch.arange(400).repeat_interleave(lengths if lengths is not None else 1)
    subject_UF = torch.rand(400, 1000, generator=rng) < 0.2
    fires_NF = subject_UF[documents_N] & (torch.rand(len(documents_N), 1000, generator=rng) < 0.5)
    f_NTF = (fires_NF * torch.rand(fires_NF.shape, generator=rng))[:, None]
    survey = survey_of(f_NTF, documents_N, (24, 12, 16), block=256, batch=256)
    random_FK = choice_of(survey, range(1000)).contexts_FK[:, 36:]
    assert (random_FK >= 0).all() and len(random_FK.unique()) <= 4 * 52
    fired = fires_NF[random_FK, torch.arange(1000)[:, None]].float().mean()
    assert abs(fired - fires_NF.float().mean()) < 0.005, (fired, fires_NF.float().mean())


def test_equal_maxima_go_to_the_lower_number():
    f_NTF = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0])[:, None, None]
    (((top, _, _)),) = chosen(survey_of(f_NTF, torch.arange(5), (2, 12, 4), batch=2, block=2), [0])
    assert top == [1, 3]


def test_missing_contexts_are_minus_one():
    f_NTF = torch.zeros(5, 3, 2)
    f_NTF[3, 1, 1] = 2.0
    survey = survey_of(f_NTF, torch.tensor([0, 1, 2, 3, 3]))
    _, max_F, contexts_FK, _, _ = choice_of(survey, [1])
    assert contexts_FK[0, :18].tolist() == [3] + [-1] * 17
    assert sorted(contexts_FK[0, 18:].tolist()) == [-1, 0, 1, 2]  # never 4, of the same document as 3
    assert max_F.tolist() == [2.0]


def test_memory_does_not_grow_with_contexts():
    rng, sizes = torch.Generator().manual_seed(4), []
    for contexts in (500, 5000):
        f_NTF = torch.rand(contexts, 1, 8, generator=rng)
        survey = survey_of(f_NTF, torch.arange(contexts), block=64, batch=64)
        held = [value for value in vars(survey).values() if torch.is_tensor(value)]
        sizes.append(sum(value.untyped_storage().nbytes() for value in held) - 16 * contexts)
        assert sum(len(contexts_B) for contexts_B, _ in survey.waiting) < 64
    assert sizes[0] == sizes[1]


def test_hard_contexts_are_strong_at_near_features_and_silent_here():
    # Features 1 and 2 have almost the same decoder row; a document is two contexts.
    rows_FD = torch.nn.functional.normalize(torch.tensor([[0, 1, 0.1], [1, 0, 0], [1, 0.1, 0], [0, 1, 0]]))
    f_NTF = torch.zeros(40, 3, 4)
    f_NTF[[0, 2, 4, 6, 8, 30, 14], 1, 1] = torch.tensor([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 0.001])
    f_NTF[[0, 10, 12, 14, 5], 2, 2] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])
    f_NTF[[20, 22], 2, 3] = torch.tensor([5.0, 4.0])
    survey = survey_of(f_NTF, torch.arange(40) // 2, (6, 1, 0))
    choice = choice_of(survey, [1, 2, 3], rows_FD)
    assert [n for n in choice.near_FM[0].tolist() if n >= 0] == [0, 20, 10, 22, 12, 14, 5]
    assert [n for n in choice.near_FM[2].tolist() if n >= 0] == [0, 0, 10, 2, 12, 4, 14, 6, 5, 8, 30]
    peak_FM = f_NTF.amax(1).T[1:].gather(1, choice.near_FM.clamp(min=0)).where(choice.near_FM >= 0, 0)
    # Not 0 and 14, on which it fires, nor 5, beside one of its own.
    assert survey.hard(choice, peak_FM, 5)[0].tolist() == [20, 10, 22, 12, -1]


def test_nearest_by_hand():
    rows = torch.tensor([[0.8, -0.6], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    cosines_FN, places_FN = nearest(rows, torch.tensor([1, 3]), 2)
    assert places_FN.tolist() == [[2, 3], [1, 2]]
    torch.testing.assert_close(cosines_FN, torch.tensor([[0.8, 0.0], [0.0, -0.6]]))
    assert nearest(rows, torch.tensor([0]), 9)[1].tolist() == [[2, 1, 3]]


def test_one_feature_alone_has_no_hard_contexts():
    survey = survey_of(torch.rand(40, 1, 2), torch.arange(40))
    choice = choice_of(survey, [1])
    assert choice.near_FM.shape == (1, 0)
    assert survey.hard(choice, torch.zeros(1, 0), 3).tolist() == [[-1, -1, -1]]


def test_frequencies_are_counts():
    f_NTF = torch.zeros(4, 5, 3)
    f_NTF[0, 0, 0] = f_NTF[3, :, 1] = 1.0
    frequency = survey_of(f_NTF, torch.arange(4)).log10_frequency()
    torch.testing.assert_close(frequency, torch.tensor([1 / 20, 5 / 20, 0.0]).log10())
    assert frequency[2] == -math.inf


def test_activations_that_are_not_finite_are_refused():
    f_NTF = torch.ones(4, 1, 1)
    f_NTF[2] = math.nan
    with pytest.raises(InputError, match="float32"):
        survey_of(f_NTF, torch.arange(4), block=2, batch=2)


def test_the_band_excludes_its_edges():
    frequency = torch.tensor([-math.inf, -3.0, -2.0, -1.5, -1.0, -0.5])
    assert in_band(frequency, -2.0, -0.5).tolist() == [3, 4]


def test_a_band_with_few_features_says_which_would_hold_more():
    frequency = torch.cat([torch.full((50,), -3.5), torch.full((40,), -2.5), torch.tensor([-1.0, -math.inf])])
    hint = "of 91 features that fire --log_freq_lower -3 would hold 41, -4 would hold 91"
    assert wider_band(frequency, -2.0, -0.1) == wider_band(frequency, -2.2, -0.1) == hint
    assert wider_band(frequency, -3.0, -0.1) == ""  # 41 of 91 are enough
    tenth = torch.tensor([-1.0] + [-2.5] * 9)
    assert wider_band(tenth, -2.0, -0.1) == "" != wider_band(tenth[[0, *range(1, 10), 9]], -2.0, -0.1)
    assert wider_band(frequency, -8.0, -3.6) == ""  # a lower limit would not help
    with pytest.raises(InputError, match=r"there is none: .*; of 91 .*-3 would hold 40, -4 would hold 90"):
        in_band(frequency, -2.0, -1.5)


def test_a_band_without_features_names_the_range():
    with pytest.raises(InputError, match=r"-0.5 and -0.1 .*from -3.00 to -1.00 .2 alive, 1 dead"):
        in_band(torch.tensor([-math.inf, -3.0, -1.0]), -0.5, -0.1)
    with pytest.raises(InputError, match="none ever fired"):
        in_band(torch.tensor([-math.inf]), -0.5, -0.1)
