"""The update of a matrix in one pass: torch's Adam on the CPU, plain torch to be compiled elsewhere."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae.autoencoder import ARCHITECTURES, Autoencoder
from sae.training import steps, update
from sae.training.buffer import ShuffleBuffer
from sae.training.trainer import Trainer


def rows(count, seed=1, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 3


COMPILED = pytest.param("compiled", True, marks=pytest.mark.long)  # half a minute of g++


@pytest.mark.parametrize(("way", "unit"), [("plain", False), ("plain", True), COMPILED])
def test_what_cuda_compiles_equals_torchs_adam(way, unit):
    """Five updates by a gradient in bfloat16, of rows in two blocks; the copy is the weights'."""
    run = update.compiled() if way == "compiled" else update.update_rows
    torch._dynamo.reset()
    begun = torch.nn.functional.normalize(rows(40, width=48), dim=1)
    W_FD, moments = begun.clone(), [torch.zeros(40, 48), torch.zeros(40, 48)]
    wanted = torch.nn.Parameter(begun.clone())
    state, copies_FD = {}, [torch.empty(40, 48, dtype=torch.bfloat16) for _ in range(2)]
    for batch in range(5):
        grad_FD = rows(40, batch, width=48).bfloat16()
        wanted.grad = grad_FD.float()
        update.adam_step(wanted, state, 1e-2, batch, copies_FD[0], unit)
        # What `adam_step` hands over on CUDA.
        numbers = (
            torch.tensor(1e-2 / (1 - 0.9 ** (batch + 1))),
            torch.tensor((1 - 0.999 ** (batch + 1)) ** 0.5),
        )
        for block in zip(*(part.split(24) for part in (W_FD, grad_FD, *moments, copies_FD[1])), strict=True):
            run(update.plain_adam, *block, unit, *numbers)
    torch.testing.assert_close(W_FD, wanted.detach(), rtol=0, atol=1e-6)
    for got_FD, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        torch.testing.assert_close(got_FD, state[name], rtol=1e-5, atol=1e-7)
    assert torch.equal(copies_FD[1], W_FD.bfloat16())
    assert (W_FD - begun).abs().max() > 0.03
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (0 if way == "plain" else 2)  # a last block that is smaller compiles once more
    if unit:
        assert torch.allclose(W_FD.norm(dim=1), torch.ones(40), atol=1e-6)


@pytest.mark.parametrize("architecture", ["relu", "batchtopk"])
def test_gradients_in_the_dtype_of_the_products(architecture):
    """As on CUDA, where no float32 gradient of a matrix is kept: the same steps as with those."""
    trainers = []
    for dtype in (torch.float32, torch.bfloat16):
        rng, k = torch.Generator().manual_seed(0), 3 if architecture == "batchtopk" else None
        trainer = Trainer(
            Autoencoder(6, 20, rng=rng, architecture=architecture, k=k),
            1e-2,
            0.3,
            torch.bfloat16,
            auxk=bool(k),
        )
        for one in (trainer.autoencoder.W_enc, trainer.autoencoder.W_dec):
            one.grad, one.grad_dtype = None, dtype
            one.grad = torch.zeros_like(one, dtype=dtype)
        trainer._refresh()
        assert (trainer._copies.room_FD is None) == (dtype == torch.bfloat16)
        trainer.silent_F[4:9] = 100  # for AuxK
        trainer.step(rows(64))
        trainers.append(trainer)
    kept, lean = (one.autoencoder for one in trainers)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        tolerance = 0 if architecture == "relu" else 1e-3  # AuxK adds, and clipping multiplies, in bfloat16
        torch.testing.assert_close(getattr(lean, name), getattr(kept, name), rtol=0, atol=tolerance, msg=name)


def test_gradients_in_bfloat16_are_clipped_by_their_norm_in_float32():
    """In bfloat16 the norm, 5.385, would be 5.375."""
    trainer = Trainer(Autoencoder(6, 20, architecture="topk", k=3), 1e-2, 0.3)
    for number, one in enumerate(trainer.trained):
        one.grad, one.grad_dtype = None, torch.bfloat16
        one.grad = rows(one.numel(), number, width=1).view(one.shape).bfloat16() / 9
    trainer._clip()
    grads = torch.cat([one.grad.float().flatten() for one in trainer.trained])
    assert grads.norm().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("features", [1, 20])
def test_products_in_float32_give_the_compiler_no_memory_twice(features, monkeypatch):
    """There the copies are the weights: traced as on a GPU that multiplies float32, nothing is refused."""
    trainers = []
    for traced in (False, True):
        trainer = Trainer(Autoencoder(6, features, rng=torch.Generator().manual_seed(0)), 1e-2, 0.3)
        assert trainer._copies.W_dec_FD.data_ptr() == trainer.autoencoder.W_dec.data_ptr()
        if traced:
            torch._dynamo.reset()
            plain = torch.compile(update.update_rows, backend="aot_eager")

            def rows_step(_adam, *parts, plain=plain):
                *parts, rate, step = parts
                numbers = rate / (1 - 0.9**step), (1 - 0.999**step) ** 0.5
                return plain(update.plain_adam, *parts, *numbers)

            monkeypatch.setattr(update, "update_rows", rows_step)
        with torch._dynamo.config.patch(suppress_errors=False):
            for batch in range(2):
                trainer.step(rows(64, batch))
        trainers.append(trainer.autoencoder)
    for name, want in trainers[0].state_dict().items():
        torch.testing.assert_close(trainers[1].state_dict()[name], want, rtol=0, atol=1e-6, msg=name)


def test_a_matrix_of_many_blocks_is_updated_as_one_of_one_is(monkeypatch):
    found = []
    for numbers in (10**6, 30):  # all rows at once; five of six numbers each
        monkeypatch.setitem(update.BLOCK, "cpu", numbers)
        trainer = Trainer(Autoencoder(6, 23, rng=torch.Generator().manual_seed(0)), 1e-2, 0.3, torch.bfloat16)
        for batch in range(3):
            trainer.step(rows(64, batch))
        found.append(trainer.autoencoder.state_dict())
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=0, atol=1e-6, msg=name)


class NothingRead(TorchDispatchMode):
    """Refuses whatever makes a GPU wait: numbers for Python, and shapes that depend on values."""

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor or "index_put" in func.name():
            assert all(one is None or one.dtype == torch.int64 for one in args[1]), func
        else:
            tags = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
            assert not set(tags) & set(func.tags), func
        return func(*args, **(kwargs or {}))


def aided(architecture, device="cpu", dtype=torch.float32, rows_ND=None):
    """A Trainer after a step; AuxK cares for some features at once, for others a step or two later."""
    width, features = rows_ND.shape[1], 4 * rows_ND.shape[1]
    k = 2 if "topk" in architecture else None
    ae = Autoencoder(width, features, False, torch.Generator().manual_seed(0), device, architecture, k)
    ae.b_enc.data[:9] = -3
    one = Trainer(ae, 1e-3, 0.1, dtype, target_l0=16.0, auxk=bool(k))
    one.silent_F[:9] = 98 - torch.arange(9, device=device) % 3
    one.step(rows_ND)
    return one


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_as_a_gpu_takes_it_reads_nothing_and_is_the_same(architecture, monkeypatch):
    """What CUDA would be given, run here, buffer and all: what dies meanwhile is cared for as on a CPU."""
    losses, found, rows_ND = [], [], rows(320, width=10)
    for read, reading in (({"cpu"}, contextlib.nullcontext()), (set(), NothingRead())):
        monkeypatch.setattr(steps, "READ_AT_ONCE", read)
        monkeypatch.setattr(steps, "SPARSE_BELOW", {})
        one = aided(architecture, rows_ND=rows_ND[:64])
        with reading:
            for x_ND in ShuffleBuffer(iter([rows_ND]), 64, 4, 2, seed=0).batches():
                one.step(x_ND)
        losses.append(torch.stack(one.losses))
        found.append(one.autoencoder.state_dict())
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=0, atol=1e-6, msg=name)
    if one.auxk:
        dead = [int((one.silent_F - back >= 100).sum()) for back in range(4)]
        assert dead[0] > dead[2] > 0 and losses[0][-1, 1] > losses[0][1, 1] * 0.5, (dead, losses[0][:, 1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: what CUDA computes has not been run")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_on_a_gpu_waits_for_nothing_and_equals_the_cpus(architecture, dtype):
    """No number is read and nothing copied between host and device while a step is queued."""
    trainers, x_ND = {}, rows(512, width=64)
    for device in ("cpu", "cuda:0"):
        trainers[device] = aided(architecture, device, dtype, x_ND.to(device))  # compiles
    begun = trainers["cpu"].autoencoder.W_dec.detach().clone()
    rows_ND = x_ND.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainers["cuda:0"].step(rows_ND)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainers["cpu"].step(x_ND)
    wanted, got = (trainer.autoencoder.state_dict() for trainer in trainers.values())
    assert (wanted["W_dec"] - begun).abs().mean() > 5e-4
    for name, want in wanted.items():
        limit = 1e-5 if dtype == torch.float32 else 3e-4  # on a CPU the two differ by a third of it
        if (architecture, name) == ("batchtopk", "threshold"):
            limit *= 100  # one of the pre-activations
        assert (got[name].cpu() - want).abs().mean() < limit, name
