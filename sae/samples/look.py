"""The second look: what the chosen features do on every token of the chosen contexts.

Dims: B contexts of a batch, b of a piece of a batch, T tokens, D act_vec_size, F features, K kept contexts.
"""

import torch

PIECE = 2**22  # numbers in a piece [b, T, F]: what is dense at any time


def feature_activations(autoencoder, batches, skip_positions=0):
    """Stream: activations [B, T, D] of contexts in, feature activations [b, T - skip_positions, F] out."""
    for acts_BTD in batches:
        acts_BTD = acts_BTD[:, skip_positions:].to(autoencoder.b_enc.device)
        size = max(1, PIECE // (acts_BTD.shape[1] * autoencoder.b_enc.numel()))
        for acts_bTD in acts_BTD.split(size):
            yield autoencoder.features(acts_bTD.flatten(0, 1)).unflatten(0, acts_bTD.shape[:2])


def read_activations(pieces, contexts_FK, features_F, tokens):
    """The second look: each feature on each token of its contexts: [F, K, tokens] float16.

    `pieces`: feature activations [b, T, all features] of the distinct contexts in `contexts_FK` (-1: none),
    ascending. They are the last T of `tokens`; before them, at the skipped positions, lie zeros. float16 ends
    at 65,504: larger ones become that.
    """
    flat, order = contexts_FK.flatten().sort()
    order = order[flat >= 0]
    place, start = flat[flat >= 0].unique_consecutive(return_inverse=True)[1], 0
    features = features_F.repeat_interleave(contexts_FK.shape[1])
    out = torch.zeros(len(features), tokens, dtype=torch.float16)
    for f_bTF in pieces:
        first, last = torch.searchsorted(place, torch.tensor([start, start + len(f_bTF)])).tolist()
        slots = order[first:last]
        at = (place[first:last] - start).to(f_bTF.device)
        values = f_bTF.transpose(1, 2)[at, features[slots].to(f_bTF.device)]
        out[slots, tokens - f_bTF.shape[1] :] = values.clamp(max=torch.finfo(torch.float16).max).half().cpu()
        start += len(f_bTF)
    return out.view(*contexts_FK.shape, tokens)
