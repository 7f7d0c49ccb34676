import itertools

import pytest
import torch

from sae import InputError
from sae.autoencoder import Autoencoder
from sae.processes import Processes
from sae.training.buffer import ShuffleBuffer
from sae.training.trainer import Resampling, Trainer, geometric_median
from sae.training.trainer import new_trainer as trainer_of
from sae.training.trainer import train as train_all

L1 = 0.3


def train(trainer, *args):
    """The events of each step of one autoencoder."""
    return (events[0] for events in train_all([trainer], *args))


def new_trainer(normalize=False, dtype=torch.float32, rate=1e-2):
    autoencoder = Autoencoder(6, 20, normalize, torch.Generator().manual_seed(0))
    autoencoder.b_enc.data = torch.linspace(-0.2, 0.2, 20)
    autoencoder.b_dec.data = torch.linspace(-1, 1, 6)
    return Trainer(autoencoder, rate, L1, dtype, frequency_block=4)


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
    with torch.no_grad():  # by which `anthropic` draws
        assert trainer._row_losses(rows(32, 4)).mean() == pytest.approx(
            float(sum(by_the_paper(weights, x_ND)[:2]))
        )


def test_thresholds_stay_above_0():
    trainer = Trainer(Autoencoder(6, 20, architecture="jumprelu"), 1e-2, L1, target_l0=2.0)
    trainer.autoencoder.threshold.data.fill_(1e-3)
    trainer.autoencoder.threshold.grad.fill_(1.0)
    trainer.update()
    assert not trainer.autoencoder.threshold.any()


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
    log10_frequency, tokens = trainer.log10_frequency(8)
    assert torch.equal(log10_frequency, torch.log10(fired_F / 32))
    assert tokens == 32


def test_frequencies_are_over_the_last_batches_whenever_they_are_asked_for():
    """Blocks of 3 batches: the latest 8 whole ones, and the batches of the one that has begun."""
    autoencoder = Autoencoder(6, 20, rng=torch.Generator().manual_seed(0))
    autoencoder.b_enc.data.fill_(-4.0)
    trainer = Trainer(autoencoder, 0.1, L1, frequency_block=3)
    fired = []
    for step in range(60):
        x_ND = rows(8, step)
        fired.append((autoencoder.encode(x_ND) > 0).sum(0))
        trainer.step(x_ND)
        log10_frequency, tokens = trainer.log10_frequency(8)
        latest = min(step + 1, 24 + step % 3 + 1)
        assert tokens == 8 * latest
        want_F = torch.log10(torch.stack(fired[-latest:]).sum(0).double() / tokens).float()
        assert torch.equal(log10_frequency, want_F), step
    assert (torch.stack(fired).sum(0) > torch.stack(fired[-latest:]).sum(0)).any()


def test_the_window_of_frequencies_is_a_million_tokens_or_half_of_a_short_run():
    config = {"act_vec_size": 4, "dict_vec_size": 8, "normalize_dataset": False, "seed": 0}
    config |= {"learning_rate": 1, "l1_coefficient": 1, "architecture": "relu", "k": None, "target_l0": None}
    config |= {"lr_warmup_batches": 0, "lr_decay_batches": 0, "l1_warmup_batches": 0}
    config |= {"scale_dataset": False, "auxk": False}
    for batch_size, num_batches, block in ((256, 100_000, 512), (1024, 240, 15), (1024, 3, 1)):
        sizes = {"batch_size_autoencoder": batch_size, "num_batches": num_batches}
        assert trainer_of(config | sizes, "cpu", torch.float32).frequency_block == block


def test_geometric_median_ignores_a_huge_row():
    x_ND = torch.cat([torch.tensor([[1.0, 2.0]]) + 0.01 * rows(200)[:, :2], torch.tensor([[1e6, -1e6]] * 20)])
    assert torch.allclose(geometric_median(x_ND), torch.tensor([1.0, 2.0]), atol=0.02)
    line = torch.tensor([[0.0], [0.0], [0.0], [10.0]])
    assert geometric_median(line).abs() < 1e-3


@pytest.mark.parametrize("normalize", [False, True])
def test_b_dec_starts_at_the_geometric_median(normalize):
    trainer = new_trainer(normalize, rate=1e-9)
    x_ND = rows(64)
    buffer = ShuffleBuffer(iter([x_ND]), 16, 4, 4, seed=0)
    next(train(trainer, buffer, 4, None, 0))
    x_ND = x_ND * trainer.autoencoder.scale(x_ND) if normalize else x_ND
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


def test_the_log_says_means_since_its_last_line_and_who_has_been_silent():
    """Against sums by hand, at rate 0, so that nothing changes but feature 19: it falls silent at 30."""
    trainer, seen = new_trainer(rate=0.0), []
    buffer = ShuffleBuffer(endless(), 16, 130, 30, 0)
    for events in train(trainer, buffer_with(buffer, seen), 130, None, 0):
        if trainer.batch == 30:
            trainer.autoencoder.b_enc.data[19] = -1e4
        for log in events:
            ae = trainer.autoencoder
            weights = [getattr(ae, name).detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
            wanted = torch.stack([torch.stack(by_the_paper(weights, x_ND)) for x_ND in seen]).mean(0)
            if log["batch"] > 50:
                assert torch.allclose(torch.tensor([log["mse"], log["l1"], log["l0"]]), wanted, rtol=1e-4)
            seen.clear()
            assert (
                log["dead"] == 0
            )  # silent, but not since the beginning: a feature is dead after 1,000 batches
    trainer.silent_F[:3] = torch.tensor([999, 1000, 1001])
    trainer.batch = 1200
    trainer.losses = [torch.ones(3)]
    assert trainer.log_line()["dead"] == 2


def buffer_with(buffer, seen):
    """The buffer, which also notes what it gives."""
    give = buffer.batches

    def batches(first):
        for x_ND in give(first):
            seen.append(x_ND)
            yield x_ND

    buffer.batches = batches
    return buffer


@pytest.mark.parametrize("num_batches", [120, 130])
def test_features_are_revived_at_the_beginning_of_a_step(num_batches):
    """What is saved after step 40 was trained by it, as if nothing were ever revived; the next revives."""
    runs = {}
    for plan in (None, Resampling("replacement", 40)):
        trainer = new_trainer()
        trainer.autoencoder.b_enc.data[:5] = -1e4
        runs[plan] = []
        buffer = ShuffleBuffer(endless(), 25, num_batches, 20, 7)
        for events in train(trainer, buffer, num_batches, plan, 7):
            revived = [event["batch"] for event in events if event["event"] == "resample"]
            runs[plan].append((trainer.autoencoder.W_dec.detach().clone(), revived))
    without, revived = runs.values()
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(without[:40], revived[:40], strict=True))
    assert not torch.equal(without[40][0][:5], revived[40][0][:5])
    # At 80 a whole interval is left to recover; at 120 ten batches would not be enough.
    assert [(step, at) for step, (_, at) in enumerate(revived, 1) if at] == [(41, [40]), (81, [80])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_after_a_revival_is_taken_with_the_revived_weights(dtype):
    trainer = new_trainer(dtype=dtype)
    trainer.autoencoder.b_enc.data[:5] = -1e4
    buffer = ShuffleBuffer(endless(), 25, 60, 20, 7)
    for _ in zip(range(41), train(trainer, buffer, 60, None, 7), strict=False):
        pass
    trainer.resample(Resampling("replacement", 40), 7, buffer)
    assert torch.equal(trainer._copies.W_dec_FD, trainer.autoencoder.W_dec.to(dtype))
    assert torch.equal(trainer._copies.W_enc_FD, trainer.autoencoder.W_enc.T.to(dtype))


def test_what_was_revived_is_no_longer_called_dead():
    """60 features that never fire are revived at batch 50; some stay silent in the 50 batches after."""
    trainer = Trainer(Autoencoder(6, 60), 1e-9, 0.0)
    trainer.autoencoder.b_enc.data.fill_(-100.0)
    trainer._refresh()
    x_ND = torch.ones(1, 6).repeat(1500, 1)
    buffer = ShuffleBuffer(iter([x_ND]), 10, 150, 150, 0)
    plan, logs = Resampling("replacement", 50), []
    for events in train(trainer, buffer, 101, plan, 0):
        logs += [event for event in events if event["event"] == "log"]
    assert logs[0]["dead"] == 60
    assert (trainer.silent_F > 45).any()
    assert logs[1]["dead"] == 0


@pytest.mark.parametrize("plan", [None, Resampling("anthropic", 30)])
def test_a_loss_that_is_not_finite_names_its_batch(plan):
    """At the next line of the log, or at a resampling before it."""

    def poisoned():
        for number, chunk in enumerate(endless()):
            yield chunk if number != 20 else torch.full_like(chunk, float("inf"))

    with pytest.raises(InputError, match=r"batch 21 gave (nan|inf)"):
        list(train(new_trainer(), ShuffleBuffer(poisoned(), 50, 60, 1, 0), 60, plan, 0))


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
    assert torch.equal(whole.log10_frequency(25)[0], again.log10_frequency(25)[0])
    assert torch.equal(whole.silent_F, again.silent_F)


def test_losses_before_a_stop_are_the_first_process_s_where_several_go_on():
    trainer = new_trainer()
    trainer.step(rows(8))
    for rank in (0, 1):
        one = Trainer(Autoencoder(6, 20, here=Processes(rank, 2, "cpu")), 1e-2, L1)
        one.restore(trainer.state())
        assert torch.equal(one.losses[0], trainer.losses[0] * (rank == 0))


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


def test_trainers_that_are_ahead_wait_for_the_others():
    """Two side by side, one of them 30 batches ahead: each ends as it does alone, with the same events."""
    plan = Resampling("anthropic", 40)

    def buffer(first=0):
        return ShuffleBuffer(endless(first // 20 * 20 * 25 // 50), 25, 130, 20, 7)

    alone, events = new_trainer(), []
    for some in train(alone, buffer(), 130, plan, 7):
        events += some
    both = [new_trainer(), new_trainer()]
    for trainer, stop in zip(both, (25, 55), strict=True):
        for _ in itertools.islice(train(trainer, buffer(), 130, plan, 7), stop):
            pass
    took = {0: [], 1: []}
    for number, found in enumerate(train_all(both, buffer(25), 130, plan, 7), 26):
        assert list(found) == ([0] if number <= 55 else [0, 1])
        for place, some in found.items():
            took[place] += some
    for trainer in both:
        for name, value in alone.autoencoder.state_dict().items():
            assert torch.equal(value, trainer.autoencoder.state_dict()[name])
    assert took[0] == [event for event in events if event["batch"] > 25]
    assert took[1] == [event for event in events if event["batch"] > 55]
