"""What features do on the tokens of contexts: activations of the LLM encoded, and read where wanted.

Dims: B contexts of a batch, b of a piece of a batch, T tokens, D act_vec_size, F features, K kept contexts.
"""

import torch

PIECE = 2**22  # numbers in a piece [b, T, F]: what is dense at any time


def encode_in_pieces(autoencoder, contexts_B, acts_BTD):
    """Numbers and LLM activations of contexts -> pieces (numbers [b], feature activations [b, T, F])."""
    acts_BTD = acts_BTD.to(autoencoder.b_enc.device)
    size = max(1, PIECE // (acts_BTD.shape[1] * autoencoder.b_enc.numel()))
    for contexts_b, acts_bTD in zip(contexts_B.split(size), acts_BTD.split(size), strict=True):
        yield contexts_b, autoencoder.features(acts_bTD.flatten(0, 1)).unflatten(0, acts_bTD.shape[:2])


def read_activations(pieces, contexts_FK, features_F, tokens):
    """The second look: each feature on each token of its contexts: [F, K, tokens] float16.

    `pieces`: (numbers [b], ascending, feature activations [b, T, all features]), each of the contexts in
    `contexts_FK` (-1: none) once, or of some: the others stay zeros. T are the last of `tokens`; before
    them, at the skipped positions, lie zeros. float16 ends at 65,504: larger ones become that.
    """
    number, slot = contexts_FK.flatten().sort()
    feature = features_F.repeat_interleave(contexts_FK.shape[1])
    out = torch.zeros(len(feature), tokens, dtype=torch.float16)
    for contexts_b, f_bTF in pieces:
        first = torch.searchsorted(number, contexts_b[0])
        last = torch.searchsorted(number, contexts_b[-1], right=True)
        here = slot[first:last]
        at = torch.searchsorted(contexts_b, number[first:last]).to(f_bTF.device)
        values = f_bTF.transpose(1, 2)[at, feature[here].to(f_bTF.device)]
        out[here, tokens - f_bTF.shape[1] :] = values.clamp(max=torch.finfo(torch.float16).max).half().cpu()
    return out.view(*contexts_FK.shape, tokens)
