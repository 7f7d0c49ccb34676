"""Keys and values of texts that begin alike: those of the beginning are there once, however many the texts.

Dims: B texts, S tokens of one and the beginning, L new ones, N kept tokens of all, H heads, D their width.
"""

import torch
from transformers import DynamicCache


class Shared(DynamicCache):
    """A cache for texts after a `beginning`: [(keys [1, H, P, D], values)], a pair for each layer.

    A layer keeps tokens in one row, the beginning's and then those of all texts; which of them a text sees is
    looked up while it attends. Without `grows` only the beginning is kept.
    """

    def __init__(self, beginning, grows):
        super().__init__()
        self._kept, self._grows, self.fill_B = [[kv[0] for kv in pair] for pair in beginning], grows, None
        keys_HND = self._kept[0][0]
        self._places_BS = torch.arange(keys_HND.shape[1], device=keys_HND.device)[None]

    def fill(self, fill_B):
        """The last `fill_B` tokens of each text are filling: as many places in front take its part."""
        self.fill_B, length = fill_B.to(self._places_BS), self.get_seq_length()
        from_BS = torch.arange(length, device=self.fill_B.device) - self.fill_B[:, None]
        self._keep(self._places_BS.gather(1, from_BS % length).masked_fill(from_BS < 0, 0))

    def select(self, texts):
        """Go on with these texts alone."""
        self.fill_B = self.fill_B[texts]
        self._keep(self._places_BS[texts])

    def _keep(self, places_BS):
        used_N, self._places_BS = places_BS.unique(return_inverse=True)
        self._kept = [[kv_HND.index_select(1, used_N) for kv_HND in pair] for pair in self._kept]

    def get_seq_length(self, layer_idx=0):
        return self._places_BS.shape[1]

    def get_mask_sizes(self, query_length, layer_idx):
        return self.get_seq_length() + query_length, 0

    def update(self, keys, values, layer_idx, *_args, **_kwargs):
        (count, _, length, _), kept = keys.shape, self._kept[layer_idx]
        new_BL = torch.arange(count * length, device=keys.device).view(count, length) + kept[0].shape[1]
        places_BS = torch.cat([self._places_BS.expand(count, -1), new_BL], 1)
        pairs = zip(kept, (keys, values), strict=True)
        kept = [torch.cat([kv_HND, new.transpose(0, 1).flatten(1, 2)], 1) for kv_HND, new in pairs]
        if self._grows:
            self._kept[layer_idx] = kept
            if layer_idx == len(self._kept) - 1:
                self._places_BS = places_BS
        seen = [kv_HND.index_select(1, places_BS.flatten()) for kv_HND in kept]
        return tuple(kv.unflatten(1, places_BS.shape).transpose(0, 1) for kv in seen)
