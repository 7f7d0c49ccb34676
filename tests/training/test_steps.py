"""The written-out gradients against torch.autograd in float64, dense and sparse, and sums done by hand."""

import pytest
import torch

from sae.autoencoder import ARCHITECTURES, Autoencoder
from sae.processes import ALONE
from sae.training import steps

WEIGHT, TARGET = 0.3, 3.0


def an_autoencoder(architecture, features=20, width=6):
    ae = Autoencoder(width, features, False, torch.Generator().manual_seed(0), None, architecture, 3)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        ae.b_enc.copy_(torch.linspace(-0.2, 0.2, features))
        ae.b_dec.copy_(torch.linspace(-1, 1, width))
        ae.W_enc.add_(0.1 * torch.randn(width, features, generator=rng))
        if architecture == "jumprelu":
            ae.threshold.copy_(torch.linspace(0, 2, features))
    for parameter in ae.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)  # what was there before must not matter
    return ae


def rows(count, seed=1, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 3


class Jump(torch.autograd.Function):
    """JumpReLU and its step with the pseudo-derivatives of Rajamanoharan et al., equations 11 and 12."""

    @staticmethod
    def forward(ctx, pre_NF, threshold_F, width):
        ctx.save_for_backward(pre_NF, threshold_F)
        ctx.width = width
        open_NF = (pre_NF > threshold_F).to(pre_NF)
        return pre_NF * open_NF, open_NF

    @staticmethod
    def backward(ctx, g_f, g_open):
        pre_NF, threshold_F = ctx.saved_tensors
        kernel_NF = ((pre_NF - threshold_F).abs() < ctx.width / 2).to(pre_NF) / ctx.width
        of_threshold_NF = -(threshold_F * g_f + g_open) * kernel_NF
        return g_f * (pre_NF > threshold_F), of_threshold_NF.sum(0), None


def by_autograd(ae, x_ND, dead_K=()):
    """(squared error, penalty) with gradients in .grad, the obvious way."""
    pre_NF = (x_ND - ae.b_dec) @ ae.W_enc + ae.b_enc
    penalty = torch.zeros(())
    if ae.architecture == "relu":
        f_NF = pre_NF.relu()
        penalty = WEIGHT * f_NF.sum(1).mean()
    elif ae.architecture == "topk":
        least_N = pre_NF.relu().sort(dim=1, descending=True).values[:, ae.k - 1]
        f_NF = pre_NF.relu() * (pre_NF >= least_N[:, None])
    elif ae.architecture == "batchtopk":
        least = pre_NF.flatten().sort(descending=True).values[ae.k * len(x_ND) - 1]
        f_NF = pre_NF.relu() * (pre_NF >= least)
    else:
        variance = (x_ND - ae.b_dec).square().mean().detach()
        f_NF, open_NF = Jump.apply(pre_NF, ae.threshold, 0.1 * variance.sqrt())
        excess = open_NF.sum(1).mean() / TARGET - 1
        penalty = WEIGHT * variance * x_ND.shape[1] * excess.square()
    error_ND = f_NF @ ae.W_dec + ae.b_dec - x_ND
    if len(dead_K):
        pre_NK = pre_NF[:, dead_K]
        kept_NK = pre_NK >= pre_NK.sort(dim=1, descending=True).values[:, min(len(dead_K), 3) - 1, None]
        rest_ND = -error_ND.detach() - (pre_NK.relu() * kept_NK) @ ae.W_dec[dead_K]
        penalty = penalty + rest_ND.square().sum(1).mean() / 32
    return error_ND.square().sum(1).mean(), penalty, f_NF


def of(dead_K, living=()):
    """These features watched as dead ones, and others as living ones."""
    numbers_K = torch.cat([dead_K, torch.tensor(living, dtype=torch.int64)])
    return steps.Watched(numbers_K, torch.isin(numbers_K, dead_K), len(numbers_K))


@pytest.mark.parametrize(("dead", "living"), [([], []), ([2, 5, 11, 17], []), ([2, 5, 11, 17], [0, 12, 19])])
@pytest.mark.parametrize("share", [0, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_autograd(architecture, share, dead, living, monkeypatch):
    """Dense (share 0) and sparse steps (share 2), with dead features among those watched and without."""
    monkeypatch.setitem(steps.SPARSE_BELOW, ("cpu", torch.float32), share)
    ae, dead_K, x_ND = an_autoencoder(architecture), torch.tensor(dead, dtype=torch.int64), rows(32)
    twin = an_autoencoder(architecture).double()
    with torch.no_grad():
        found = steps.gradients(ae, steps.copies(ae, torch.float32), x_ND, WEIGHT, TARGET, of(dead_K, living))
    error, penalty, f_NF = by_autograd(twin, x_ND.double(), dead_K)
    for parameter in twin.parameters():
        parameter.grad = None
    (error + penalty).backward()
    assert 0.02 < (f_NF > 0).double().mean() < 0.8
    for (name, parameter), want in zip(ae.named_parameters(), twin.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.double(), want.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert found.error_ND.square().sum(1).mean().item() == pytest.approx(error.item(), rel=1e-5)
    assert found.penalty.item() == pytest.approx(penalty.item(), rel=1e-5)
    assert torch.equal(found.fired_F, (f_NF > 0).sum(0))


@pytest.mark.parametrize("read", [{"cpu"}, set()])
def test_the_smallest_value_that_batchtopk_keeps_wherever_the_floor_is(read, monkeypatch):
    """Above it lie all numbers, as many as are asked for, one less, or none; a GPU does not look at it."""
    monkeypatch.setattr(steps, "READ_AT_ONCE", read)
    pre_NF = rows(16, width=20)
    sorted_S = pre_NF.flatten().sort(descending=True).values
    for floor in (-100, sorted_S[40], sorted_S[39], 100):
        assert steps._kth_of_batch(pre_NF, 40, floor, ALONE) == sorted_S[39]


@pytest.mark.parametrize(("target_l0", "fired"), [(0.001, 1), (3.0, 192), (20, 1280)])
def test_the_first_threshold_for_any_target(target_l0, fired):
    """As many of the pre-activations of a batch lie at it or above it; never below 0."""
    ae, x_ND = an_autoencoder("jumprelu"), rows(64)
    with torch.no_grad():
        ae.b_enc.add_(100)  # all would fire
        copies = steps.copies(ae, torch.float32)
        pre_NF = steps.encode(ae, copies, x_ND).pre_NF
        threshold = steps.first_threshold(ae, copies, x_ND, target_l0)
        ae.b_enc.sub_(200)  # and now none
        assert steps.first_threshold(ae, copies, x_ND, target_l0) == 0
    assert (pre_NF >= threshold).sum() == fired


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_no_feature_is_negative_where_fewer_than_k_are_above_0(architecture):
    ae, x_ND = an_autoencoder(architecture), rows(16)
    ae.k = 20
    with torch.no_grad():
        f_NF = steps.encode(ae, steps.copies(ae, torch.float32), x_ND).features()
    torch.testing.assert_close(f_NF, ((x_ND - ae.b_dec) @ ae.W_enc + ae.b_enc).relu())
