import math

import pytest
import torch

from sae import InputError
from sae.samples import RANDOM, SPREAD, TOP, Samples, Survey, in_band, load_samples, only, save_samples
from sae.samples.look import feature_activations, read_activations
from sae.samples.survey import NEVER


class Width:
    """All that a Survey asks of an autoencoder."""

    def __init__(self, features):
        self.b_enc = torch.zeros(features)


def survey_of(f_NTF, documents_N, top=6, spread=12, seed=0, batch=7, block=50):
    rng = torch.Generator().manual_seed(seed)
    survey = Survey(Width(f_NTF.shape[2]), documents_N, top, spread, rng)
    survey.block_CF = torch.empty(block, f_NTF.shape[2])  # several blocks even in small tests
    for piece in f_NTF.split(batch):
        survey.add(piece)
    return survey


def chosen(survey, features, random=4, top=6, spread=12):
    """Per feature the lists of its top, spread and random contexts, without the missing."""
    contexts_FK, kind_FK, _ = survey.choose(torch.tensor(features), random)
    assert kind_FK[0].tolist() == [TOP] * top + [SPREAD] * spread + [RANDOM] * random
    kinds = contexts_FK.split([top, spread, random], 1)
    return [[[n for n in row.tolist() if n >= 0] for row in rows] for rows in zip(*kinds, strict=True)]


def brute_force(survey, f_NTF, documents_N, feature, top=6, spread=12):
    """Top and spread with everything in sight: sort all, then draw bin by bin from the maximum down."""
    value_N = f_NTF[:, :, feature].amax(1)
    order = sorted((n for n in range(len(value_N)) if value_N[n] > 0), key=lambda n: (-value_N[n].item(), n))
    best, drawn, used = [], [], set()
    for n in order:
        if len(best) < top and documents_N[n].item() not in used:
            best.append(n)
            used.add(documents_N[n].item())
    draw_N = (survey.draw_F[feature] * survey.draw_N) >> 21 & (NEVER - 1)
    bins = (value_N * (spread / value_N.max())).ceil().clamp(1, spread)
    for number in range(spread, 0, -1):
        inside = [n for n in order if bins[n] == number and documents_N[n].item() not in used]
        if inside:
            drawn.append(min(inside, key=lambda n: draw_N[n].item()))
            used.add(documents_N[drawn[-1]].item())
    return best, drawn


SHAPES = {
    "even": lambda v: v,
    "mostly low": lambda v: v**6,
    "often silent": lambda v: torch.relu(v - 0.9),
    "ties": lambda v: (v * 8).round() / 8,
    "a cliff": lambda v: torch.where(v < 0.8, v * 0.05, 0.8 + v * 0.2),
    "growing": lambda v: v * torch.linspace(0.01, 1, len(v))[:, None, None],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("contexts", [30, 800])
def test_top_and_spread_equal_brute_force(shape, contexts, monkeypatch):
    # Enough where documents have one context: nothing to spare.
    monkeypatch.setattr("sae.samples.survey.DEPTH", 1)
    rng = torch.Generator().manual_seed(contexts)
    f_NTF = SHAPES[shape](torch.rand(contexts, 2, 4, generator=rng))
    documents_N = torch.randperm(contexts, generator=rng)
    survey = survey_of(f_NTF, documents_N)
    features = [f for f in range(4) if f_NTF[:, :, f].any()]
    for feature, (top, spread, _) in zip(features, chosen(survey, features), strict=True):
        assert (top, spread) == brute_force(survey, f_NTF, documents_N, feature)


def test_documents_with_many_contexts_count_once():
    rng = torch.Generator().manual_seed(1)
    f_NTF = torch.rand(600, 2, 8, generator=rng) ** 4
    documents_N = torch.randint(0, 90, (600,), generator=rng)  # in no order: a document ends anywhere
    survey = survey_of(f_NTF, documents_N)
    spreads = 0
    for feature, (top, spread, random) in enumerate(chosen(survey, range(8))):
        best, drawn = brute_force(survey, f_NTF, documents_N, feature)
        assert top == best
        spreads += spread == drawn
        documents = documents_N[top + spread + random].tolist()
        assert len(set(documents)) == len(documents)
        assert len(random) == 4
    assert spreads >= 6  # a draw may be lost where the first DEPTH in a bin are all of used documents


def test_results_do_not_depend_on_batches_or_blocks():
    rng = torch.Generator().manual_seed(2)
    f_NTF, documents_N = torch.rand(500, 2, 6, generator=rng) ** 3, torch.arange(500)
    wanted = chosen(survey_of(f_NTF, documents_N), range(6))
    assert chosen(survey_of(f_NTF, documents_N, batch=500), range(6)) == wanted
    assert chosen(survey_of(f_NTF, documents_N, batch=1, block=256), range(6)) == wanted
    assert chosen(survey_of(f_NTF, documents_N, seed=1), range(6)) != wanted


def test_draws_are_fair_wherever_the_maximum_comes():
    # 20 contexts share a bin, the maximum comes last: each must win a twentieth of 2,000 draws.
    value = torch.cat(
        [torch.linspace(0.30, 0.32, 20), torch.linspace(0.05, 0.1, 60), torch.tensor([0.5, 1.0])]
    )
    f_NTF = value[:, None, None].expand(-1, 1, 1000).contiguous()
    wins = torch.zeros(20)
    for seed in range(2):
        survey = survey_of(f_NTF, torch.arange(82), top=2, spread=4, seed=seed, block=16)
        spread = survey.choose(torch.arange(1000), 1)[0][:, 2:6]
        wins += torch.bincount(spread[(spread >= 0) & (spread < 20)], minlength=20)
    assert wins.sum() == 2000
    assert ((wins - 100) ** 2 / 100).sum() < 43.8  # chi squared, 19 degrees of freedom, p = 0.001


def test_random_contexts_ignore_the_feature():
    # The feature fires on the first half alone; its random contexts come from both halves.
    f_NTF = torch.zeros(400, 1, 200)
    f_NTF[:200] = torch.rand(200, 1, 200, generator=torch.Generator().manual_seed(3))
    survey = survey_of(f_NTF, torch.arange(400), top=2, spread=2)
    random_FK = survey.choose(torch.arange(200), 8)[0][:, 4:]
    assert 0.4 < (random_FK >= 200).float().mean() < 0.6
    assert len(random_FK.unique()) == 48  # 4 K contexts serve all features


def test_equal_maxima_go_to_the_lower_number():
    f_NTF = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0])[:, None, None]
    (((top, _, _),)) = chosen(survey_of(f_NTF, torch.arange(5), top=2, batch=2, block=2), [0], top=2)
    assert top == [1, 3]


def test_missing_contexts_are_minus_one():
    f_NTF = torch.zeros(5, 3, 2)
    f_NTF[3, 1, 1] = 2.0
    survey = survey_of(f_NTF, torch.tensor([0, 1, 2, 3, 3]))
    contexts_FK, _, max_F = survey.choose(torch.tensor([1]), 4)
    assert contexts_FK[0, :18].tolist() == [3] + [-1] * 17
    assert sorted(contexts_FK[0, 18:].tolist()) == [-1, 0, 1, 2]  # never 4, of the same document as 3
    assert max_F.tolist() == [2.0]


@pytest.mark.parametrize("shape", ["even", "a cliff", "ties"])
def test_candidates_stay_few(shape):
    rng = torch.Generator().manual_seed(4)
    sizes = []
    for contexts in (1000, 10000):
        f_NTF = SHAPES[shape](torch.rand(contexts, 1, 8, generator=rng))
        survey = survey_of(f_NTF, torch.arange(contexts), block=256, batch=256)
        survey._prune()
        sizes.append(survey.pruned / 8)
    assert sizes[1] < 200 and sizes[1] < 1.5 * sizes[0], sizes


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
        survey_of(f_NTF, torch.arange(4), block=2)


def test_the_band_excludes_its_edges():
    frequency = torch.tensor([-math.inf, -3.0, -2.0, -1.5, -1.0, -0.5])
    assert in_band(frequency, -2.0, -0.5).tolist() == [3, 4]


def test_a_band_without_features_names_the_range():
    with pytest.raises(InputError, match=r"-0.5 and -0.1 .*from -3.00 to -1.00 .2 alive, 1 dead"):
        in_band(torch.tensor([-math.inf, -3.0, -1.0]), -0.5, -0.1)
    with pytest.raises(InputError, match="none ever fired"):
        in_band(torch.tensor([-math.inf]), -0.5, -0.1)


def test_second_look_reads_every_token():
    rng = torch.Generator().manual_seed(5)
    f_NTF = torch.rand(6, 3, 4, generator=rng)
    f_NTF[5, 0, 2] = 1e6
    contexts_FK = torch.tensor([[5, 2, -1], [2, 0, 5]])
    kept = f_NTF[[0, 2, 5]]
    got = read_activations(kept.split(2), contexts_FK, torch.tensor([2, 3]), tokens=5)
    assert got.shape == (2, 3, 5) and got.dtype == torch.float16
    assert not got[:, :, :2].any() and not got[0, 2].any()
    torch.testing.assert_close(got[1, :, 2:], f_NTF[[2, 0, 5], :, 3].half(), rtol=0, atol=0)
    assert got[0, 0, 2:].tolist() == [65504.0, *f_NTF[5, 1:, 2].half().tolist()]


def test_feature_activations_come_in_pieces(monkeypatch):
    class Doubling(Width):
        def features(self, x_ND):
            return x_ND.float() * 2

    monkeypatch.setattr("sae.samples.look.PIECE", 2 * 3 * 4)  # two contexts of three tokens and four features
    acts_BTD = torch.arange(5 * 4 * 4.0).view(5, 4, 4)
    pieces = list(feature_activations(Doubling(4), iter([acts_BTD]), skip_positions=1))
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    assert torch.equal(torch.cat(pieces), acts_BTD[:, 1:] * 2)


def test_round_trip(tmp_path):
    samples = Samples(
        {"layer_id": 3}, "d", "a", 640, torch.tensor([-1.0, -math.inf]), torch.tensor([0]),
        torch.tensor([2.5]), torch.tensor([[4, -1]]), torch.ones(1, 2, 8, dtype=torch.float16),
        torch.tensor([[TOP, RANDOM]]).char(),
    )  # fmt: skip
    save_samples(tmp_path / "s.pt", samples)
    back = load_samples(tmp_path / "s.pt")
    assert torch.load(tmp_path / "s.pt", weights_only=True)["features"].tolist() == [0]
    for name, value in samples._asdict().items():
        same = (
            torch.equal(value, getattr(back, name))
            if torch.is_tensor(value)
            else value == getattr(back, name)
        )
        assert same, name


def test_only_keeps_the_asked_features_in_ascending_order():
    F, K, T = 3, 2, 4
    samples = Samples(
        {}, "d", "a", 9, torch.zeros(8), torch.tensor([2, 5, 7]), torch.tensor([1.0, 2.0, 3.0]),
        torch.arange(F * K).view(F, K), torch.arange(F * K * T).view(F, K, T).half(),
        torch.zeros(F, K).char(),
    )  # fmt: skip
    some = only(samples, [7, 2])
    assert some.features.tolist() == [2, 7]
    assert some.max_activation.tolist() == [1.0, 3.0]
    assert some.rows.tolist() == [[0, 1], [4, 5]]
    assert torch.equal(some.activations, samples.activations[[0, 2]])
    assert len(some.log10_frequency) == 8
    with pytest.raises(InputError, match="3, 9 are not among them"):
        only(samples, [9, 2, 3])
