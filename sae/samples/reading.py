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


def read_activations(pieces, choice, tokens):
    """The second look: each feature on each token of its contexts, [F, K, tokens] float16, and the highest
    activation in each of the contexts near it, [F, M] float32.

    `pieces`: (numbers [b], ascending, activations [b, T, all features]) of the contexts in `choice`, each
    once; 0 is left where another process reads. T are the last of `tokens`: before them, at the skipped
    positions, lie zeros. float16 ends at 65,504: larger ones become that.
    """
    kept, near = (_Places(choice.features_F, part) for part in (choice.contexts_FK, choice.near_FM))
    out = torch.zeros(choice.contexts_FK.numel(), tokens, dtype=torch.float16)
    peak = torch.zeros(choice.near_FM.numel())
    for contexts_b, f_bTF in pieces:
        slots, values = kept.read(contexts_b, f_bTF.transpose(1, 2))
        out[slots, tokens - f_bTF.shape[1] :] = values.clamp(max=torch.finfo(torch.float16).max).half()
        slots, values = near.read(contexts_b, f_bTF.amax(1))
        peak[slots] = values
    return out.view(*choice.contexts_FK.shape, tokens), peak.view(choice.near_FM.shape)


class _Places:
    """Where the contexts of features, [F, K], stand when they come by in the order of their numbers."""

    def __init__(self, features_F, contexts_FK):
        self.number, self.slot = contexts_FK.flatten().sort()
        self.feature = features_F.repeat_interleave(contexts_FK.shape[1])[self.slot]

    def read(self, contexts_b, values_bF):
        """The places among the F * K that these contexts fill, and the values [b, F, ...] for them."""
        first = torch.searchsorted(self.number, contexts_b[0])
        last = torch.searchsorted(self.number, contexts_b[-1], right=True)
        at = torch.searchsorted(contexts_b, self.number[first:last]).to(values_bF.device)
        values = values_bF[at, self.feature[first:last].to(values_bF.device)]
        return self.slot[first:last], values.cpu()
