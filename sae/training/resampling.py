"""Reviving dead features, by the two methods of Bricken et al. 2023.

Where features are shared out over processes (`autoencoder.here`), each revives its own, all at once.
Dims: K dead features, M inputs looked at, D act_vec_size, F dict_vec_size.
"""

import torch
from torch.nn import functional

NUM_INPUTS = 819_200  # how many inputs the `anthropic` method draws from


def pick_inputs(loss_M, count, rng):
    """[count] numbers of inputs, each drawn with probability proportional to its loss squared.

    Independent draws: an input may be picked twice. rng: a numpy Generator.
    """
    weight_M = loss_M.double().square().clamp_min(1e-300)  # all equal where nothing is lost
    return torch.from_numpy(rng.choice(len(loss_M), size=count, p=(weight_M / weight_M.sum()).numpy()))


@torch.no_grad()
def revive_from_inputs(autoencoder, optimizer, dead_K, inputs_KD):
    """`anthropic`: decoder rows become the inputs at unit norm, less b_dec, as the encoder sees them.

    Encoder columns get the same direction at 0.2 x the mean encoder norm of the living features (of norm 1,
    the norm at the start, where none lives); encoder biases become 0.
    """
    direction_KD = functional.normalize(inputs_KD - autoencoder.b_dec, dim=1)
    norm, _ = _living(autoencoder, dead_K)
    _replace(autoencoder, optimizer, dead_K, 0.2 * norm * direction_KD, direction_KD)


@torch.no_grad()
def revive_at_random(autoencoder, optimizer, dead_K, rng):
    """`replacement`: fresh vectors as at the start (unit norm, encoder = decoder), zero bias."""
    deaths = autoencoder.here.everyone(len(dead_K))
    # Those of the processes before this one are drawn as well: what a feature gets does not depend on N.
    for count in deaths[: autoencoder.here.rank + 1]:
        fresh_KD = rng.standard_normal((count, autoencoder.W_dec.shape[1]), dtype="float32")
    fresh_KD = functional.normalize(torch.from_numpy(fresh_KD), dim=1).to(autoencoder.W_dec.device)
    _replace(autoencoder, optimizer, dead_K, fresh_KD, fresh_KD)


def _living(autoencoder, dead_K):
    """Means over the living features of all processes: encoder norm, threshold (None without any).

    Where none lives they are 1 and the mean of all thresholds.
    """
    alive_F = torch.ones(len(autoencoder.b_enc), dtype=torch.bool, device=dead_K.device)
    alive_F[dead_K] = False
    living = autoencoder.here.sum(int(alive_F.sum()))
    norms = torch.linalg.vector_norm(autoencoder.W_enc[:, alive_F], dim=0)
    norm = autoencoder.here.total(norms.sum()) / living if living else 1.0
    if autoencoder.architecture != "jumprelu":
        return norm, None
    some_F = alive_F if living else slice(None)
    count = autoencoder.here.sum(len(autoencoder.threshold[some_F]))
    return norm, autoencoder.here.total(autoencoder.threshold[some_F].sum()) / count


def _replace(autoencoder, optimizer, dead_K, encoder_KD, decoder_KD):
    changed = [(autoencoder.W_dec, 0), (autoencoder.W_enc, 1), (autoencoder.b_enc, 0)]
    if autoencoder.architecture == "jumprelu":
        # As far above the new encoder's activations as the living features' thresholds are above theirs.
        norm, mean = _living(autoencoder, dead_K)
        autoencoder.threshold[dead_K] = torch.linalg.vector_norm(encoder_KD, dim=1) / norm * mean
        changed.append((autoencoder.threshold, 0))
    autoencoder.W_dec[dead_K] = decoder_KD
    autoencoder.W_enc[:, dead_K] = encoder_KD.T
    autoencoder.b_enc[dead_K] = 0
    for parameter, where in changed:
        # Adam still remembers the old direction and would pull the new feature back.
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[parameter]:
                optimizer.state[parameter][moment].index_fill_(where, dead_K, 0)
