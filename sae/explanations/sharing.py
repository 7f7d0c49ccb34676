"""Keys and values of texts that begin alike: those of the beginning are there once, however many the texts.

Dims: B texts, H heads, P tokens of the beginning, O own ones of a text, S all of a text, D width of a head.
"""

import torch
from torch.nn.functional import embedding
from transformers import DynamicCache


class Shared(DynamicCache):
    """A cache for texts after a `beginning`: [(keys [1, H, P, D], values)], a pair for each layer.

    While a layer attends, its pair is joined with the texts' own, which are kept where the cache `grows`.
    """

    def __init__(self, beginning, grows):
        super().__init__()
        self._beginning, self._grows, self.fill_B, self._places_BS = beginning, grows, None, None

    def fill(self, fill_B):
        """The last `fill_B` tokens of each text are filling: from now on in front of all the others."""
        self.fill_B, self._filled = fill_B.to(self._beginning[0][0].device), self.get_seq_length()

    def select(self, kept):
        """Go on with the texts at these places alone."""
        kept = torch.tensor(kept, device=self.fill_B.device)
        self.batch_select_indices(kept)
        self.fill_B = self.fill_B[kept]

    def get_seq_length(self, layer_idx=0):
        return self._beginning[0][0].shape[2] + super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length, layer_idx):
        return self.get_seq_length(layer_idx) + query_length, 0

    def update(self, keys, values, layer_idx, *_args, **_kwargs):
        if self._grows:
            keys, values = super().update(keys, values, layer_idx)
        beginning = self._beginning[layer_idx]
        return tuple(self._joined(first, own) for first, own in zip(beginning, (keys, values), strict=True))

    def _joined(self, first_1HPD, own_BHOD):
        (count, heads, own, width), begin = own_BHOD.shape, first_1HPD.shape[2]
        if self.fill_B is None:
            return torch.cat([first_1HPD.expand(count, -1, -1, -1), own_BHOD], 2)
        if self._places_BS is None or self._places_BS.shape != (count, begin + own):
            place_S = torch.arange(begin + own, device=own_BHOD.device)
            turned_BS = (place_S - self.fill_B[:, None]) % self._filled
            moved_BS = torch.where(place_S < self._filled, turned_BS, place_S)
            text_B1 = own * torch.arange(count, device=own_BHOD.device)[:, None]
            self._places_BS = torch.where(moved_BS < begin, moved_BS, moved_BS + text_B1)
        # Each token's place among the beginning's and then all texts' own.
        all_NHD = torch.cat([first_1HPD[0].transpose(0, 1), own_BHOD.transpose(1, 2).flatten(0, 1)])
        return embedding(self._places_BS, all_NHD.flatten(1)).unflatten(2, (heads, width)).transpose(1, 2)
