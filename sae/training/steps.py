"""The gradients of a training step, written out, by dense products or by sparse ones.

    loss = mean over rows of ||x - x'||^2 + penalty

    relu             penalty = c * mean over rows of sum f
    jumprelu         penalty = c * V * (L0 / target - 1)^2, V the mean over rows of ||x - b_dec||^2
    topk, batchtopk  penalty = AUX * mean over rows of ||x - x' - x''||^2, x'' by dead features alone (AuxK)

where c is l1_coefficient. Autograd would also make the gradient of x, a sixth product of a batch and a matrix
of weights, and it multiplies by zeros: of the five products only the encoder's needs all N F numbers.

Where an autoencoder's features are shared out over processes, all take a step on the same rows at once. What
is exchanged, in this order: what decides which features fire, the sum of the reconstructions, jumprelu's L0,
the same two of AuxK, and [D] numbers of b_dec's gradient. All other gradients are a feature's own.

Dims: N rows of a batch, S entries of [N, F] that matter, D act_vec_size, F dict_vec_size, K dead features.
"""

import functools
import warnings
from typing import NamedTuple

import torch

from sae.autoencoder import largest, least
from sae.processes import ALONE

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # for a user of the script

# A step is sparse below this share of entries that matter. That depends on the batch alone: a resumed run
# computes as the whole one did. Nobody has measured it on a GPU yet: there every step is dense.
SPARSE_BELOW = {("cpu", torch.float32): 0.05, ("cpu", torch.bfloat16): 0.01}
READ_AT_ONCE = {"cpu"}  # devices whose numbers are there; of a GPU, all that is queued is waited for first
BANDWIDTH = 0.1  # jumprelu: width of the kernel, in units of the root mean square of x - b_dec
AUX = 1 / 32
THRESHOLD_SHARE = 0.03  # batchtopk: of the newest batch in the running mean of the smallest value kept


class Copies(NamedTuple):
    """The weights as dense products take them, feature-major; room for a gradient kept in another dtype."""

    W_enc_FD: torch.Tensor
    W_dec_FD: torch.Tensor
    room_FD: torch.Tensor | None


class Encoded(NamedTuple):
    """Pre-activations of a batch; those above `cut` pass unchanged, the others become 0."""

    centred_ND: torch.Tensor  # x - b_dec, in the dtype of the products, as pre_NF
    pre_NF: torch.Tensor
    cut: torch.Tensor  # one for all [], for each row [N, 1] or for each feature [F]

    def features(self):
        return self.pre_NF * (self.pre_NF > self.cut)


class Watched(NamedTuple):
    """Features that may be dead."""

    numbers_K: torch.Tensor
    dead_K: torch.Tensor | None  # whether they are, at this step
    count: int  # K of all processes


class Found(NamedTuple):
    """What a step tells beside the gradients."""

    error_ND: torch.Tensor  # x' - x
    penalty: torch.Tensor  # this process's share of it
    fired_F: torch.Tensor  # rows that each feature fired on, int64
    cut: torch.Tensor  # as the encoder had it


def copies(ae, dtype):
    W_enc_FD, W_dec_FD = (weights.detach().to(dtype) for weights in (ae.W_enc.T, ae.W_dec))
    return Copies(W_enc_FD, W_dec_FD, None if ae.W_dec.grad.dtype == dtype else torch.empty_like(W_enc_FD))


def encode(ae, copies, x_ND):
    centred_ND = (x_ND - ae.b_dec).to(copies.W_enc_FD.dtype)
    pre_NF = torch.addmm(ae.b_enc.to(centred_ND.dtype), centred_ND, copies.W_enc_FD.T)
    return Encoded(centred_ND, pre_NF, _cut(ae, pre_NF))


def _cut(ae, pre_NF):
    """In training BatchTopK looks at the whole batch. Equals of the smallest value kept are kept too."""
    if ae.architecture == "jumprelu":
        return ae.threshold
    if ae.architecture == "topk":
        smallest = _kth_largest(pre_NF, ae.k, ae.here)
    elif ae.architecture == "batchtopk":
        smallest = _kth_of_batch(pre_NF, ae.k * len(pre_NF), ae.threshold[0] / 2, ae.here)
    else:
        return pre_NF.new_zeros(())
    return torch.nextafter(smallest, smallest.new_zeros(())).clamp_min_(0)


def _kth_largest(pre_NF, k, here):
    """[N, 1]: the k-th largest number of each row, over the features of all processes."""
    return least(pre_NF.topk(min(k, pre_NF.shape[1]), dim=1, sorted=False).values, k, here)


def _kth_of_batch(pre_NF, count, floor, here):
    """[]: the `count`-th largest number of a batch; quick on a CPU where enough of them lie above `floor`."""
    flat = pre_NF.view(-1)
    if flat.device.type in READ_AT_ONCE:
        above = flat[(flat > floor).nonzero()[:, 0]]
        flat = above if here.sum(len(above)) >= count else flat
    return _kth_largest(flat[None], count, here)[0, 0]


def first_threshold(ae, copies, x_ND, target_l0):
    """The threshold above which target_l0 features of a row fire, on average over a batch."""
    pre_NF = encode(ae, copies, x_ND).pre_NF
    return _kth_of_batch(pre_NF, max(1, round(target_l0 * len(x_ND))), 0, ae.here).clamp(min=0)


def reconstruct(ae, copies, x_ND, f_NF):
    """x' - x, float32, by a dense product."""
    return ae.here.total((f_NF @ copies.W_dec_FD).float()).add_(ae.b_dec).sub_(x_ND)


def gradients(ae, copies, x_ND, weight=0.0, target_l0=None, watched=None):
    """Fill `.grad` of all that is trained. weight: c of the penalty; watched: for AuxK (None: without it)."""
    encoded, width = encode(ae, copies, x_ND), 0
    pre_NF, edge = encoded.pre_NF, encoded.cut
    if ae.architecture == "jumprelu":
        variance = encoded.centred_ND.float().square().mean()
        weight, width = weight * variance * x_ND.shape[1], BANDWIDTH * variance.sqrt()
        edge = edge - width / 2
    matters_NF = pre_NF > edge
    limit = SPARSE_BELOW.get((pre_NF.device.type, pre_NF.dtype), 0)
    few = limit and int(matters_NF.count_nonzero()) < limit * pre_NF.numel()
    through = functools.partial(_through, ae, len(x_ND), weight, target_l0, width)
    parts = (x_ND, encoded, through)
    found = sparse(ae, matters_NF, *parts) if few else dense(ae, copies, *parts)
    if watched and watched.count:
        aux = _auxk(ae, copies, encoded, found.error_ND, watched)
        found = found._replace(penalty=found.penalty + (ae.here.rank == 0) * aux)
    # b_dec is added to the reconstruction and taken from the input.
    ae.b_dec.grad.sub_(ae.here.total(ae.W_enc @ ae.b_enc.grad))
    return found


def _through(ae, rows, weight, target_l0, width, g, pre, cut, f):
    """Gradients of features, entry by entry -> of their pre-activations and thresholds; and the penalty."""
    if ae.architecture == "relu":
        g_pre = torch.ops.aten.threshold_backward(g + weight / rows, f, 0)
        return g_pre, None, weight * f.sum(dtype=torch.float32) / rows
    g_pre = torch.ops.aten.threshold_backward(g, f, 0)
    if ae.architecture != "jumprelu":
        return g_pre, None, g.new_zeros(())
    # The step has no gradient: a rectangle of this width around the threshold stands in for it.
    excess = ae.here.total(f.count_nonzero()) / (rows * target_l0) - 1
    slope = 2 * weight * excess / (rows * target_l0)
    near = (pre - cut).abs() < width / 2
    return g_pre, (cut * g + slope) * near / -width, (ae.here.rank == 0) * weight * excess.square()


def dense(ae, copies, x_ND, encoded, through):
    """By products of whole matrices."""
    f_NF = encoded.features()
    error_ND = reconstruct(ae, copies, x_ND, f_NF)
    g_ND = (error_ND * (2 / len(x_ND))).to(f_NF.dtype)
    g_NF, of_threshold_NF, penalty = through(g_ND @ copies.W_dec_FD.T, encoded.pre_NF, encoded.cut, f_NF)
    pairs = ((ae.W_dec.grad, f_NF, g_ND), (ae.W_enc.grad.T, g_NF, encoded.centred_ND))
    for grad_FD, left_NF, right_ND in pairs:
        if copies.room_FD is None:
            torch.mm(left_NF.T, right_ND, out=grad_FD)
        else:
            grad_FD.copy_(torch.mm(left_NF.T, right_ND, out=copies.room_FD))
    ae.b_enc.grad.copy_(g_NF.sum(0, dtype=torch.float32))
    ae.b_dec.grad.copy_(g_ND.sum(0, dtype=torch.float32))
    if of_threshold_NF is not None:
        ae.threshold.grad.copy_(of_threshold_NF.sum(0))
    return Found(error_ND, penalty, f_NF.sign().sum(0, dtype=torch.float32).long(), encoded.cut)


def sparse(ae, matters_NF, x_ND, encoded, through):
    """The same by the entries that matter alone, in float32: the four products after the encoder's."""
    (rows, width), place_S = matters_NF.shape, matters_NF.view(-1).nonzero()[:, 0]
    row_S, feature_S = place_S // width, place_S % width
    ends_N = torch.bincount(row_S, minlength=rows).cumsum(0)
    starts = torch.cat([ends_N.new_zeros(1), ends_N])

    def matrix(value_S):
        return torch.sparse_csr_tensor(starts, feature_S, value_S, (rows, width), check_invariants=False)

    def product(grad_FD, value_S, right_ND):  # into memory that is there: fresh pages cost more than the sums
        torch.addmm(grad_FD, matrix(value_S).t().to_sparse_csr(), right_ND, beta=0, out=grad_FD)

    pre_S = encoded.pre_NF.view(-1)[place_S].float()
    cut_S = encoded.cut[feature_S] if encoded.cut.dim() == 1 else pre_S.new_zeros(())
    f_S = pre_S * (pre_S > cut_S)
    f = matrix(f_S)
    error_ND = ae.here.total(f @ ae.W_dec).add_(ae.b_dec).sub_(x_ND)
    g_ND = error_ND * (2 / rows)
    g_S = torch.sparse.sampled_addmm(f, g_ND, ae.W_dec.T, beta=0.0).values()
    g_S, of_threshold_S, penalty = through(g_S, pre_S, cut_S, f_S)
    product(ae.W_dec.grad, f_S, g_ND)
    product(ae.W_enc.grad.T, g_S, encoded.centred_ND.float())
    ae.b_enc.grad.zero_().index_add_(0, feature_S, g_S)
    ae.b_dec.grad.copy_(g_ND.sum(0))
    if of_threshold_S is not None:
        ae.threshold.grad.zero_().index_add_(0, feature_S, of_threshold_S)
    return Found(error_ND, penalty, torch.bincount(feature_S[f_S > 0], minlength=width), encoded.cut)


def _auxk(ae, copies, encoded, error_ND, watched):
    """The dead features that come nearest to firing are trained on what the others left (Gao et al.)."""
    numbers_K, most = watched.numbers_K, error_ND.shape[1] // 2
    # Those alive stay out of it, as what is negative does.
    W_dec_KD, pre_NK = copies.W_dec_FD[numbers_K], encoded.pre_NF[:, numbers_K]
    pre_NK.masked_fill_(~watched.dead_K, 0)
    f_NK = largest(pre_NK, min(watched.count, most), ae.here if watched.count > most else ALONE)
    rest_ND = ae.here.total((f_NK @ W_dec_KD).float()).add_(error_ND)
    g_ND = (rest_ND * (2 * AUX / len(rest_ND))).to(f_NK.dtype)
    g_NK = torch.ops.aten.threshold_backward(g_ND @ W_dec_KD.T, f_NK, 0)
    ae.W_dec.grad.index_add_(0, numbers_K, (f_NK.T @ g_ND).to(ae.W_dec.grad.dtype))
    ae.W_enc.grad.T.index_add_(0, numbers_K, (g_NK.T @ encoded.centred_ND).to(ae.W_enc.grad.dtype))
    ae.b_enc.grad.index_add_(0, numbers_K, g_NK.sum(0, dtype=torch.float32))
    some = ae.here.total(watched.dead_K.sum()) > 0  # as if nothing were asked for where none is dead
    return some * AUX * rest_ND.square().sum() / len(rest_ND)
