"""Both methods against a slow, obvious reference, feature by feature."""

import math

import numpy as np
import pytest
import torch

from sae.autoencoder import Autoencoder
from sae.training.buffer import ShuffleBuffer
from sae.training.resampling import pick_inputs, revive_at_random, revive_from_inputs
from sae.training.trainer import Resampling, Trainer

DEAD = [1, 4, 5]


@pytest.fixture
def trained():
    """An autoencoder after three Adam steps, so that every moment is non-zero."""
    torch.manual_seed(0)
    trainer = Trainer(Autoencoder(3, 7), 1e-2, 0.1)
    trainer.autoencoder.b_enc.data.fill_(2.0)
    trainer._refresh()
    for _ in range(3):
        trainer.step(torch.randn(50, 3))
    for state in trainer.optimizer.state.values():
        assert (state["exp_avg_sq"] != 0).all()
    return trainer


def snapshot(trainer):
    autoencoder, moments = trainer.autoencoder, trainer.optimizer.state
    weights = {name: value.detach().clone() for name, value in autoencoder.named_parameters()}
    adam = {
        name: {key: value.clone() for key, value in moments[parameter].items()}
        for name, parameter in autoencoder.named_parameters()
    }
    return weights, adam


def of_feature(name, tensor, feature):
    return tensor[:, feature] if name == "W_enc" else tensor[feature]


def assert_only_the_dead_changed(before, after):
    """Weights of living features stay; Adam's moments become zero where weights changed, else stay."""
    for name in ("W_enc", "b_enc", "W_dec"):
        for feature in range(7):
            old, new = (of_feature(name, weights[name], feature) for weights, _ in (before, after))
            for moment in ("exp_avg", "exp_avg_sq"):
                m_old, m_new = (of_feature(name, adam[name][moment], feature) for _, adam in (before, after))
                assert torch.equal(m_new, torch.zeros_like(m_new) if feature in DEAD else m_old)
            assert torch.equal(old, new) == (feature not in DEAD)
        assert before[1][name]["step"] == after[1][name]["step"]
    assert torch.equal(before[0]["b_dec"], after[0]["b_dec"])
    assert all(torch.equal(before[1]["b_dec"][key], after[1]["b_dec"][key]) for key in before[1]["b_dec"])


def test_anthropic_vectors_by_hand(trained):
    before, inputs_KD = snapshot(trained), torch.tensor([[3.0, 0, 0], [0, -2.0, 1.0], [5.0, 5.0, 5.0]])
    revive_from_inputs(trained.autoencoder, trained.optimizer, torch.tensor(DEAD), inputs_KD)
    after = snapshot(trained)
    assert_only_the_dead_changed(before, after)
    living = [
        math.sqrt(sum(w**2 for w in before[0]["W_enc"][:, f].tolist())) for f in range(7) if f not in DEAD
    ]
    for feature, x in zip(DEAD, inputs_KD.tolist(), strict=True):
        direction = [a - b for a, b in zip(x, before[0]["b_dec"].tolist(), strict=True)]
        length = math.sqrt(sum(d**2 for d in direction))
        want = torch.tensor([d / length for d in direction])
        assert torch.allclose(after[0]["W_dec"][feature], want, atol=1e-6)
        assert torch.allclose(
            after[0]["W_enc"][:, feature], want * 0.2 * sum(living) / len(living), atol=1e-6
        )
        assert after[0]["b_enc"][feature] == 0


def test_replacement_vectors(trained):
    before = snapshot(trained)
    revive_at_random(trained.autoencoder, trained.optimizer, torch.tensor(DEAD), np.random.default_rng(0))
    after = snapshot(trained)
    assert_only_the_dead_changed(before, after)
    fresh = after[0]["W_dec"][DEAD]
    assert torch.allclose(fresh.norm(dim=1), torch.ones(3))
    assert torch.equal(after[0]["W_enc"][:, DEAD].T, fresh)
    assert (fresh @ fresh.T - torch.eye(3)).abs().max() < 0.999  # three different ones
    assert not after[0]["b_enc"][DEAD].any()


def test_inputs_are_drawn_by_their_loss_squared():
    picked = pick_inputs(torch.tensor([1.0, 0.0, 2.0, 3.0]), 140_000, np.random.default_rng(0))
    share = torch.bincount(picked, minlength=4) / len(picked)
    assert torch.allclose(share, torch.tensor([1, 0, 4, 9]) / 14, atol=0.005)
    assert len(pick_inputs(torch.zeros(3), 2, np.random.default_rng(0))) == 2


def run_until(trainer, rows_ND, plan, batches):
    """The events of `batches` steps over the same rows, 10 a batch, and the buffer."""
    buffer = ShuffleBuffer(iter([rows_ND.repeat(batches, 1)]), len(rows_ND), batches, 4, seed=0)
    for _ in buffer.batches():
        trainer.step(rows_ND)
        if trainer.batch == batches:
            return trainer.resample(plan, 0, buffer), buffer


def one_sided(features_that_fire):
    """An autoencoder of 4 features on rows [+-1, ...]: exactly `features_that_fire` can fire, and do."""
    trainer = Trainer(Autoencoder(2, 4), 1e-9, 0.0)
    trainer.autoencoder.b_enc.data = torch.tensor(
        [5.0 if f in features_that_fire else -5.0 for f in range(4)]
    )
    trainer._refresh()
    return trainer


@pytest.mark.parametrize("method", ["replacement", "anthropic"])
def test_who_counts_as_dead(method):
    """6 batches, interval 6: `replacement` looks back at all six, `anthropic` at the last three."""
    rows_ND, plan = torch.randn(10, 2, generator=torch.Generator().manual_seed(1)), Resampling(method, 6)
    trainer = one_sided({0, 1})
    trainer.step(rows_ND)
    trainer.step(rows_ND)
    trainer.autoencoder.b_enc.data[1] = -5.0  # feature 1 fires in batches 1 and 2 only
    trainer._refresh()
    event, _ = run_until(trainer, rows_ND, plan, 6)
    expected = {2, 3} if method == "replacement" else {1, 2, 3}
    assert event["revived"] == len(expected)
    # A revived feature's bias is 0, another's stays where it was.
    assert set((trainer.autoencoder.b_enc == 0).nonzero()[:, 0].tolist()) == expected
    assert plan.window == (6 if method == "replacement" else 3)


def test_anthropic_draws_from_the_buffer():
    rows_ND = torch.randn(10, 2, generator=torch.Generator().manual_seed(1))
    trainer = one_sided({0})
    ae = trainer.autoencoder
    ae.b_enc.data *= 10
    ae.b_dec.data += 0.5
    ae.factor = 3.0
    run_until(trainer, rows_ND, Resampling("anthropic", 4), 4)
    directions = torch.nn.functional.normalize(3 * rows_ND - ae.b_dec, dim=1)
    for feature in (1, 2, 3):
        assert (directions @ ae.W_dec[feature]).max() > 1 - 1e-5


def test_same_seed_same_revival():
    results = []
    for _ in range(2):
        rows_ND = torch.randn(10, 2, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        trainer = one_sided({0})
        run_until(trainer, rows_ND, Resampling("anthropic", 4), 4)
        results.append(trainer.autoencoder.W_dec.detach().clone())
    assert torch.equal(*results)


def test_each_revival_draws_anew():
    trainer, plan, drawn = one_sided(()), Resampling("replacement", 4), []
    for batch in (4, 8):
        trainer.batch, trainer.silent_F[:] = batch, 4
        assert trainer.resample(plan, 0, None)["revived"] == 4
        drawn.append(trainer.autoencoder.W_dec.detach().clone())
    assert not torch.allclose(*drawn)


@pytest.mark.parametrize("living", [True, False])
def test_revived_jumprelu_features_get_a_threshold_that_suits_them(living):
    """The living features' mean threshold, in proportion to the new encoder's norm; and fresh moments."""
    dead_K = torch.tensor([1, 4] if living else range(7))
    trainer = Trainer(Autoencoder(3, 7, architecture="jumprelu"), 1e-2, 0.1, target_l0=2.0)
    ae = trainer.autoencoder.requires_grad_(False)
    for _ in range(3):
        trainer.step(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))
    ae.threshold.copy_(torch.tensor([1.0, 50, 2, 3, 60, 4, 5]))
    ae.W_enc.mul_(3 / torch.linalg.vector_norm(ae.W_enc, dim=0))
    assert trainer.optimizer.state[ae.threshold]["exp_avg_sq"].any()
    revive_at_random(ae, trainer.optimizer, dead_K, np.random.default_rng(0))
    if living:
        assert ae.threshold.tolist() == pytest.approx([1, 1, 2, 3, 1, 4, 5])  # 3 for an encoder of norm 3
    else:
        assert ae.threshold.tolist() == pytest.approx([125 / 7] * 7)
    assert not trainer.optimizer.state[ae.threshold]["exp_avg_sq"][dead_K].any()
    inputs_KD = torch.randn(len(dead_K), 3)
    revive_from_inputs(ae, trainer.optimizer, dead_K, inputs_KD)
    if living:
        assert ae.threshold[dead_K].tolist() == pytest.approx([0.6, 0.6])
