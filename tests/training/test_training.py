import itertools

import pytest
import torch

from sae import InputError
from sae.autoencoder import Autoencoder
from sae.training.buffer import ShuffleBuffer
from sae.training.folder import RunFolder
from sae.training.trainer import Resampling, Trainer, geometric_median, train

L1 = 0.3


def new_trainer(normalize=False, dtype=torch.float32, rate=1e-2):
    autoencoder = Autoencoder(6, 20, normalize, torch.Generator().manual_seed(0))
    autoencoder.b_enc.data = torch.linspace(-0.2, 0.2, 20)
    autoencoder.b_dec.data = torch.linspace(-1, 1, 6)
    return Trainer(autoencoder, rate, L1, dtype)


def rows(count, seed=1):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) * 3


def by_the_paper(weights, x_ND):
    W_enc, b_enc, W_dec, b_dec = weights
    f_NF = torch.relu((x_ND - b_dec) @ W_enc + b_enc)
    error_N = (f_NF @ W_dec + b_dec - x_ND).square().sum(1)
    return error_N.mean(), L1 * f_NF.abs().sum(1).mean(), (f_NF > 0).float().sum(1).mean()


@pytest.mark.parametrize("normalize", [False, True])
def test_a_step_is_autograd_projection_adam_and_renormalisation(normalize):
    """Five steps against torch.autograd, torch.optim.Adam and a loop over the rows, in float64."""
    trainer = new_trainer(normalize)
    ae = trainer.autoencoder
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    weights = [getattr(ae, name).detach().double().clone().requires_grad_() for name in names]
    adam = torch.optim.Adam(weights, lr=1e-2, betas=(0.9, 0.999))
    for step in range(5):
        x_ND = rows(32, step)
        trainer.step(x_ND)
        x_ND = x_ND.double()
        if normalize:
            x_ND = x_ND / x_ND.norm(dim=1, keepdim=True) * 6**0.5
        terms = by_the_paper(weights, x_ND)
        adam.zero_grad()
        (terms[0] + terms[1]).backward()
        for row, grad in zip(weights[2].detach(), weights[2].grad, strict=True):
            grad -= (grad @ row) * row
        adam.step()
        with torch.no_grad():
            for row in weights[2]:
                row /= row.norm()
        assert torch.allclose(trainer.losses[-1].double(), torch.stack(terms).detach(), rtol=1e-5)
    for name, want in zip(names, weights, strict=True):
        assert torch.allclose(getattr(ae, name).double(), want, atol=2e-5), name
    assert torch.allclose(ae.W_dec.norm(dim=1), torch.ones(20), atol=1e-6)


def test_counts_of_what_fired():
    trainer = new_trainer()
    fired_F, silent_F = torch.zeros(20), torch.zeros(20)
    for step in range(4):
        x_ND = rows(8, step)
        f_NF = trainer.autoencoder.encode(x_ND).detach()
        trainer.step(x_ND)
        fired_F += (f_NF > 0).sum(0)
        silent_F = torch.where((f_NF > 0).any(0), 0, silent_F + 1)
    assert torch.equal(trainer.silent_F.float(), silent_F)
    assert torch.equal(trainer.take_log10_frequency(), torch.log10(fired_F / 32))
    assert torch.isinf(trainer.take_log10_frequency()).all()


def test_geometric_median_ignores_a_huge_row():
    x_ND = torch.cat([torch.tensor([[1.0, 2.0]]) + 0.01 * rows(200)[:, :2], torch.tensor([[1e6, -1e6]] * 20)])
    assert torch.allclose(geometric_median(x_ND), torch.tensor([1.0, 2.0]), atol=0.02)
    line = torch.tensor([[0.0], [0.0], [0.0], [10.0]])
    assert geometric_median(line).abs() < 1e-3


def test_b_dec_starts_at_the_geometric_median():
    trainer = new_trainer(rate=1e-9)
    x_ND = rows(64)
    buffer = ShuffleBuffer(iter([x_ND]), 16, 4, 4, seed=0)
    next(train(trainer, buffer, 4, None, 0))
    assert torch.allclose(trainer.autoencoder.b_dec, geometric_median(x_ND), atol=1e-5)


def endless(seed=0):
    for number in itertools.count():
        yield rows(50, seed + number)


def test_it_runs_exactly_num_batches_and_logs_means():
    trainer = new_trainer()
    events = list(train(trainer, ShuffleBuffer(endless(), 16, 120, 30, 0), 120, None, 0))
    assert len(events) == trainer.batch == 120
    logs = [event for batch in events for event in batch]
    assert [log["batch"] for log in logs] == [50, 100, 120]
    assert logs[-1]["tokens"] == 120 * 16
    assert logs[-1]["loss"] == pytest.approx(logs[-1]["mse"] + logs[-1]["l1"])
    assert logs[-1]["loss"] < logs[0]["loss"]


@pytest.mark.parametrize("plan", [None, Resampling("anthropic", 30)])
def test_a_loss_that_is_not_finite_names_its_batch(plan):
    """At the next line of the log, or at a resampling before it."""

    def poisoned():
        for number, chunk in enumerate(endless()):
            yield chunk if number != 20 else torch.full_like(chunk, float("inf"))

    with pytest.raises(InputError, match=r"batch 21 gave (nan|inf)"):
        list(train(new_trainer(), ShuffleBuffer(poisoned(), 50, 60, 1, 0), 60, plan, 0))


def test_a_broken_state_is_never_saved(tmp_path):
    trainer = new_trainer()
    folder = RunFolder(tmp_path, {"batch_size_autoencoder": 8}, resume=False)
    trainer.step(rows(8))
    folder.save_resume(trainer)
    before = (tmp_path / "resume.pt").read_bytes()
    trainer.step(torch.full((8, 6), float("nan")))
    for save in (folder.save_resume, lambda trainer: folder.save_checkpoint(trainer, {})):
        with pytest.raises(InputError, match="batch 2 gave nan"):
            save(trainer)
    assert (tmp_path / "resume.pt").read_bytes() == before
    assert [path.name for path in tmp_path.glob("*.pt")] == ["resume.pt"]


@pytest.mark.parametrize("stop", [3, 57, 90])
def test_state_restores_to_the_same_bits(stop):
    """Stopped at any batch, in a new Trainer: the same weights and the same events as undisturbed."""
    plan = Resampling("anthropic", 40)

    def undisturbed():
        trainer = new_trainer()
        return trainer, list(train(trainer, ShuffleBuffer(endless(), 25, 130, 20, 7), 130, plan, 7))

    whole, events = undisturbed()
    trainer = new_trainer()
    before = list(
        itertools.islice(train(trainer, ShuffleBuffer(endless(), 25, 130, 20, 7), 130, plan, 7), stop)
    )
    state = trainer.state()
    again = new_trainer()
    again.restore(state)
    chunks = endless(stop // 20 * 20 * 25 // 50)
    after = list(train(again, ShuffleBuffer(chunks, 25, 130, 20, 7), 130, plan, 7))
    assert before + after == events
    for name, value in whole.autoencoder.state_dict().items():
        assert torch.equal(value, again.autoencoder.state_dict()[name])


def planted(dictionary_GD, count, rng):
    """Rows that are sparse sums of the planted dictionary: on average 3 of G features, values 1 to 2."""
    active_NG = torch.rand(count, len(dictionary_GD), generator=rng) < 3 / len(dictionary_GD)
    values_NG = 1 + torch.rand(count, len(dictionary_GD), generator=rng)
    return (active_NG * values_NG) @ dictionary_GD


def recover(features, plan=None, dead_half=False):
    """Mean best cosine between 64 planted directions and the learnt ones."""
    rng = torch.Generator().manual_seed(0)
    dictionary_GD = torch.nn.functional.normalize(torch.randn(64, 32, generator=rng), dim=1)
    trainer = Trainer(Autoencoder(32, features, rng=rng), 1e-2, 0.3)
    if dead_half:
        # No direction and a negative bias: without help these features never fire.
        trainer.autoencoder.W_enc.data[:, features // 2 :] = 0
        trainer.autoencoder.b_enc.data[features // 2 :] = -1.0
        trainer._refresh()
    buffer = ShuffleBuffer((planted(dictionary_GD, 512, rng) for _ in itertools.count()), 256, 1000, 40, 0)
    for _ in train(trainer, buffer, 1000, plan, 0):
        pass
    return (dictionary_GD @ trainer.autoencoder.W_dec.T).max(1).values.mean().item()


def test_training_recovers_a_planted_dictionary():
    assert recover(128) > 0.95


def test_each_resampling_method_beats_none_when_half_the_features_start_dead():
    none = recover(80, dead_half=True)
    assert none < 0.9
    for method in ("replacement", "anthropic"):
        assert recover(80, Resampling(method, 200), dead_half=True) > 0.97


def test_bfloat16_products_stay_within_noise_of_float32():
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        rng = torch.Generator().manual_seed(0)
        dictionary_GD = torch.nn.functional.normalize(torch.randn(64, 32, generator=rng), dim=1)
        trainer = Trainer(Autoencoder(32, 128, rng=torch.Generator().manual_seed(1)), 1e-2, 0.3, dtype)
        buffer = ShuffleBuffer((planted(dictionary_GD, 512, rng) for _ in itertools.count()), 256, 500, 40, 0)
        logs = [event for events in train(trainer, buffer, 500, None, 0) for event in events]
        held_out = planted(dictionary_GD, 4096, torch.Generator().manual_seed(9))
        error = (trainer.autoencoder(held_out) - held_out).square().sum()
        variance = (held_out - held_out.mean(0)).square().sum()
        results[dtype] = (logs[-1]["loss"], (1 - error / variance).item())
    (loss, explained), (loss_low, explained_low) = results.values()
    assert loss_low == pytest.approx(loss, rel=0.01)
    assert explained_low == pytest.approx(explained, abs=0.005)
    assert explained > 0.7
