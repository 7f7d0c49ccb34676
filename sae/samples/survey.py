"""What one pass over many contexts keeps of every feature: how often it fires, and contexts that show it.

Dims: N contexts of the run, B contexts of a batch, C contexts of a block, U documents of a block, T tokens,
F features (all of them, or the selected), K kept contexts of a feature, M candidates for them, L cells.

A context that a feature fires on is kept as a key, an int64; a stronger context has a greater key, 0 is none.
Bits 32 to 62 are the activation (the bits of positive float32 numbers sort as the numbers do); bits 0 to 31
count down as the context's number goes up: of equal activations the lower number has the greater key.
"""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from sae import InputError

BLOCK = 2**21  # numbers in a block [C, F]
LOW = 2**32 - 1  # the bits of a key with the context's number
# The upper bits of an activation tell its cell: its power of two, and which eighth of the way to the next.
CELL_BIT = 52
DRAW = 2**CELL_BIT - 2**32  # the bits that a draw takes in a key: those of the activation within its cell
CELLS_OF_STEP = 4  # two steps from an activation to its half
NEAR, OF_NEAR = 8, 6  # features of the nearest decoder rows, and strongest contexts of each


def between(log10_frequency, lower, upper):
    return (log10_frequency > lower) & (log10_frequency < upper)


def in_band(log10_frequency, lower, upper):
    """The features with lower < log10 frequency < upper, ascending; InputError where there is none."""
    features = between(log10_frequency, lower, upper).nonzero()[:, 0]
    if len(features) == 0:
        alive = log10_frequency[log10_frequency > -math.inf]
        came = f"they lie from {alive.min():.2f} to {alive.max():.2f}" if len(alive) else "none ever fired"
        other = wider_band(log10_frequency, lower, upper)
        raise InputError(
            f"features with log10 frequency between {lower:g} and {upper:g} needed, there is none: {came} "
            f"({len(alive)} alive, {len(log10_frequency) - len(alive)} dead){other and '; '}{other}"
        )
    return features


def wider_band(log10_frequency, lower, upper):
    """How many features wider bands would hold, in words; "" where this holds a tenth of those that fire."""
    alive, limits = int((log10_frequency > -math.inf).sum()), {}  # of each count the highest lower limit
    for limit in (lower, *range(math.ceil(lower) - 1, -9, -1)):
        limits.setdefault(int(between(log10_frequency, limit, upper).sum()), limit)
    held, *more = limits
    if 10 * held >= alive or not more:
        return ""
    parts = (f"{limits[count]} would hold {count}" for count in more)
    return f"of {alive} features that fire --log_freq_lower {', '.join(parts)}"


class Choice(NamedTuple):
    """Which contexts show the selected features, by number; -1 where there are fewer."""

    features_F: torch.Tensor
    max_F: torch.Tensor
    contexts_FK: torch.Tensor
    kind_FK: torch.Tensor
    near_FM: torch.Tensor  # where features of near decoder rows fire most, the strongest of each first


class Survey:
    """Counts, the strongest contexts and drawn ones of every feature, from a pass over contexts.

    documents_N: the document of each context; a context's number is its place there. `choose` picks for each
    feature contexts of distinct documents:
    - random: `num_random`, whatever it does there. They are picked first: of the documents that the others
      leave, it would fire in too few;
    - top: of the other documents the `num_top` with the highest activation, each by its best context;
    - spread: `num_spread` geometric steps of the activation, two from the maximum to its half and so on, and
      from each the context that was drawn; steps without one are made up for by second draws in the others.

    Draws are fixed by context and feature. What is kept does not depend on the order in which contexts come,
    nor on how they were shared out to several surveys before `merge`. Memory: O(features), and 16 bytes a
    context.
    """

    def __init__(self, autoencoder, documents_N, num_top, num_spread, num_random, rng):
        device, width = autoencoder.b_enc.device, autoencoder.b_enc.numel()
        self.documents_N = documents_N.to(device)
        self.nums = num_top, num_spread, num_random
        self.draw_N = torch.randint(2**CELL_BIT, documents_N.shape, generator=rng).to(device)
        self.draw_F = torch.randint(2**CELL_BIT, (width,), generator=rng).to(device) | 1
        self.block, self.waiting = min(256, max(32, BLOCK // width)), []
        self.tokens = 0
        self.count_F = torch.zeros(width, dtype=torch.int64, device=device)
        # Random contexts may take documents of the strongest: as many more are kept.
        self.top_FM = torch.zeros(width, num_top + num_random, dtype=torch.int64, device=device)
        # The drawn context of each cell; its key has the draw where the activation within the cell was. Cell
        # c has slot c modulo L: it is overwritten by cell c + L, and not wanted once the maximum is there.
        self.drawn_FL = torch.zeros(width, CELLS_OF_STEP * num_spread, dtype=torch.int64, device=device)

    def add(self, contexts_B, f_BTF):
        """Look at contexts: their numbers, and feature activations [B, T, F]."""
        self.count_F += f_BTF.flatten(0, 1).sign().sum(0).long()  # a piece is small: exact in float32
        self.tokens += f_BTF.shape[0] * f_BTF.shape[1]
        self.waiting.append((contexts_B.to(f_BTF.device), f_BTF.amax(1)))
        if sum(len(contexts_b) for contexts_b, _ in self.waiting) >= self.block:
            self._keep()

    def state(self):
        """What `merge` takes, on the CPU."""
        self._keep()
        return self.tokens, self.count_F.cpu(), self.top_FM.cpu(), self.drawn_FL.cpu()

    def merge(self, tokens, count_F, top_FM, drawn_FL):
        """Add what another survey, of other contexts of the same run, has seen."""
        self.tokens += tokens
        self.count_F += count_F.to(self.count_F)
        self._keep_top(top_FM.to(self.top_FM))
        self.drawn_FL = self.drawn_FL.maximum(drawn_FL.to(self.drawn_FL))

    def log10_frequency(self):
        """[F] float32: log10 of the share of tokens each feature fired on, -inf where it never did."""
        return (self.count_F.double() / max(self.tokens, 1)).log10().float().cpu()

    def choose(self, features_F, W_dec_FD):
        """The Choice for some features; W_dec_FD: the decoder rows of all."""
        self._keep()
        features_F = features_F.to(self.documents_N.device)
        num_top, num_spread, num_random = self.nums
        # All features draw from the same few contexts, each in its order: the second look has few to read.
        common_R = self.draw_N.argsort()[: 4 * sum(self.nums)]
        order_FR = self._draw(features_F, common_R).argsort(1)
        lots_FM = LOW - common_R[order_FR]
        # Where documents are few, random contexts first take their share of them alone.
        fair = min(num_random, len(self.documents_N.unique()) * num_random // sum(self.nums))
        random_FK = self._pick(lots_FM, fair, lots_FM[:, :0])
        top_FK = self._pick(self.top_FM[features_F], num_top, random_FK)
        taken_FK = torch.cat([random_FK, top_FK], 1)
        spread_FK = self._pick(self._by_steps(features_F), num_spread, taken_FK).sort(descending=True).values
        taken_FK = torch.cat([taken_FK, spread_FK], 1)
        more_FK = self._pick(lots_FM, num_random - fair, taken_FK)
        key_FK = torch.cat([top_FK, spread_FK, random_FK, more_FK], 1)
        kind_K = torch.arange(3, dtype=torch.int8).repeat_interleave(torch.tensor(self.nums))
        max_F = (self.top_FM[features_F, 0] >> 32).int().view(torch.float32)
        strong_FK = self._context(top_FK)[:, :OF_NEAR].where(top_FK[:, :OF_NEAR] > 0, -1)
        _, near_FN = nearest(W_dec_FD[features_F], torch.arange(len(features_F)), NEAR)
        near_FM = strong_FK[near_FN].transpose(1, 2).flatten(1)
        contexts_FK = self._context(key_FK).where(key_FK > 0, -1)
        parts = features_F, max_F, contexts_FK, kind_K.repeat(len(key_FK), 1), near_FM
        return Choice(*(part.cpu() for part in parts))

    def hard(self, choice, peak_FM, most):
        """Contexts [F, most] of `choice.near_FM`, -1 where there are fewer, in which the feature is silent.

        peak_FM: what it does there at most. No context is of a document that the feature has one of.
        """
        device = self.documents_N.device
        near_FM, peak_FM, kept_FK = (x.to(device) for x in (choice.near_FM, peak_FM, choice.contexts_FK))
        key_FM = (LOW - near_FM).where((near_FM >= 0) & (peak_FM == 0), 0)
        key_FH = self._pick(key_FM, most, (LOW - kept_FK).where(kept_FK >= 0, 0))
        return self._context(key_FH).where(key_FH > 0, -1).cpu()

    def _keep(self):
        """Take the waiting contexts into what is kept."""
        if not self.waiting:
            return
        context_C, value_CF = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting = []
        if not value_CF.isfinite().all():
            raise InputError("finite activations needed, the LLM gave others: try --dtype_llm float32")
        value_FC = value_CF.T.contiguous()
        key_FC = value_FC.view(torch.int32).long() << 32 | LOW - context_C
        key_FC = key_FC.where(value_FC > 0, 0)
        document_U, of_C = self.documents_N[context_C].unique(return_inverse=True)
        best_FU = key_FC.new_zeros(len(key_FC), len(document_U))
        best_FU.scatter_reduce_(1, of_C.expand_as(key_FC), key_FC, "amax")
        self._keep_top(best_FU.topk(min(len(document_U), self.top_FM.shape[1])).values)
        all_F = torch.arange(len(key_FC), device=key_FC.device)
        drawn_FC = (key_FC & ~DRAW | self._draw(all_F, context_C)).where(key_FC > 0, 0)
        cell_FC = (key_FC >> CELL_BIT) % self.drawn_FL.shape[1]
        self.drawn_FL.scatter_reduce_(1, cell_FC, drawn_FC, "amax")

    def _keep_top(self, key_FM):
        """Of the kept and these the greatest keys, for each document its greatest alone."""
        key_FM = torch.cat([self.top_FM, key_FM], 1).sort(1, descending=True).values
        document_FM, order_FM = self._document(key_FM).sort(dim=1, stable=True)
        again_FM = pad(document_FM[:, 1:] == document_FM[:, :-1], (1, 0))
        key_FM.masked_fill_(torch.zeros_like(again_FM).scatter(1, order_FM, again_FM), 0)
        self.top_FM = key_FM.sort(1, descending=True).values[:, : self.top_FM.shape[1]]

    def _by_steps(self, features_F):
        """[F, L] keys of the drawn contexts: the first of every step, strongest first, then the second ..."""
        key_FL = self.drawn_FL[features_F]
        top_F1 = self.top_FM[features_F, :1] >> CELL_BIT
        cell_FL = top_F1 - torch.arange(key_FL.shape[1], device=key_FL.device)
        key_FL = key_FL.gather(1, cell_FL % key_FL.shape[1])
        key_FSM = key_FL.where(key_FL >> CELL_BIT == cell_FL, 0).unflatten(1, (-1, CELLS_OF_STEP))
        order_FSM = (key_FSM & DRAW).argsort(-1, descending=True)
        return key_FSM.gather(-1, order_FSM).transpose(1, 2).flatten(1)

    def _pick(self, key_FM, most, taken_FK):
        """Of each feature's candidates, in order, the first `most` of documents not taken: keys [F, most]."""
        at, count_F = taken_FK.shape[1], key_FM.new_zeros(len(key_FM))
        picked_FK = pad(taken_FK, (0, most))
        used_FK = self._document(picked_FK).where(picked_FK > 0, -1)
        for key_F in key_FM.T:
            if (count_F == most).all():
                break
            document_F = self._document(key_F)
            new_F = (key_F > 0) & (count_F < most) & (used_FK != document_F[:, None]).all(1)
            slot = new_F.nonzero()[:, 0], at + count_F[new_F]
            picked_FK[slot], used_FK[slot] = key_F[new_F], document_F[new_F]
            count_F += new_F
        return picked_FK[:, at:]

    def _draw(self, features_F, contexts_C):
        """[F, C]: a random number of each feature and context, in the bits DRAW (multiply-shift hashing)."""
        return self.draw_F[features_F, None] * self.draw_N[contexts_C] & DRAW

    def _context(self, key):
        return (LOW - (key & LOW)).clamp_(max=len(self.documents_N) - 1)

    def _document(self, key):
        return self.documents_N[self._context(key)]


def nearest(rows_ND, places_F, count):
    """Of unit rows the `count` or fewer closest to each one at `places_F`, but itself: cosines, places."""
    found = []
    for places_f in places_F.split(1024):
        cosine_fN = rows_ND[places_f] @ rows_ND.T
        cosine_fN[torch.arange(len(places_f)), places_f] = -2
        found.append(cosine_fN.topk(min(count, len(rows_ND) - 1)))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
