"""Interpretation samples: which features, and the contexts that show what each does.

One pass over the activations of many contexts (`Survey`) counts how often every feature fires and remembers
candidates; a second look at the chosen contexts alone (`read_activations`) reads the feature on every token.

Dims: N contexts looked at, C contexts of a block, U documents of a block, B contexts of a batch, b of a piece
of a batch, T tokens, D act_vec_size, F features (all of them, or the selected), K kept contexts of a feature,
L cells of a feature's range, P candidates of all features in one row.
"""

import math

import torch

from sae import InputError

BLOCK = 2**21  # numbers in a block [C, F]
DEPTH = 3  # how many of the first draws stay known in whatever becomes a bin
NEVER = 2**30  # above every draw
LOW = 2**32 - 1  # the lower half of a key


def between(log10_frequency, lower, upper):
    return (log10_frequency > lower) & (log10_frequency < upper)


def in_band(log10_frequency, lower, upper):
    """The features with lower < log10 frequency < upper, ascending; InputError where there is none."""
    features = between(log10_frequency, lower, upper).nonzero()[:, 0]
    if len(features) == 0:
        alive = log10_frequency[log10_frequency > -math.inf]
        came = f"they lie from {alive.min():.2f} to {alive.max():.2f}" if len(alive) else "none ever fired"
        raise InputError(
            f"features with log10 frequency between {lower:g} and {upper:g} needed, there is none: "
            f"{came} ({len(alive)} alive, {len(log10_frequency) - len(alive)} dead)"
        )
    return features


class Survey:
    """What a pass over contexts leaves: frequencies, the top contexts, candidates for the spread.

    Contexts come in the order of `documents_N`, the document of each; a context's number is its place there.
    Kept per feature: the `num_top` documents with the highest activation, each by its best context (of equal
    ones the lower number); and, of all other contexts it fires on, those that may still be drawn.

    Spread: `num_spread` bins of equal width between 0 and the maximum. Each (feature, context) has a random
    draw, and the lowest draw in a bin wins. The maximum is known only at the end, but bins only widen while
    it grows: a context that has the lowest draw in no window of today's bin width will never have it in a
    bin. The others are few, however many contexts come: about 2 per bin plus the logarithm of their number.
    They are kept DEPTH times over (then without the first, ...), because a winner may be of a document that
    is used already: the next in the bin takes its place. Exactly fair where documents have one context each.

    Memory: O(features), and 24 bytes a context. Results do not depend on how contexts were batched.
    """

    def __init__(self, autoencoder, documents_N, num_top, num_spread, rng):
        device, width = autoencoder.b_enc.device, autoencoder.b_enc.numel()
        self.rng = rng
        self.documents_N = documents_N.to(device)
        self.draw_N = torch.randint(2**30, 2**31, documents_N.shape, generator=self.rng).to(device)
        self.draw_F = (torch.randint(2**29, 2**30, (width,), generator=self.rng) * 2 + 1).to(device)
        self.num_spread = num_spread
        self.tokens = self.contexts = self.merged = 0
        self.count_F = torch.zeros(width, dtype=torch.int64, device=device)
        self.block_CF = torch.empty(min(256, max(32, BLOCK // width)), width, device=device)
        self.top_FK = torch.zeros(width, num_top, dtype=torch.int64, device=device)  # keys; 0: none
        self.pool = [torch.empty(2, 0, dtype=torch.int64, device=device)]  # (feature, key) in pieces
        self.pruned = 0  # candidates when the pool was last pruned
        # Cells of half a bin, the last one divided again and again towards the maximum; then what exceeds it.
        near = 2 * num_spread - 0.5 ** torch.arange(1, 16)
        edges_L = torch.cat([torch.arange(1.0, 2 * num_spread), near, torch.tensor([2.0 * num_spread])])
        self.edges_L = edges_L.to(device)
        self.scale_F = torch.ones(width, device=device)  # cells per unit of activation
        self.limit_FL = torch.full((width, len(edges_L) + 1), NEVER, dtype=torch.int32, device=device)

    def add(self, f_BTF):
        """Look at the next contexts: feature activations [B, T, F]."""
        self.count_F += f_BTF.flatten(0, 1).sign().sum(0).long()  # a piece is small: exact in float32
        self.tokens += f_BTF.shape[0] * f_BTF.shape[1]
        max_BF = f_BTF.amax(1)
        while len(max_BF):
            filled = self.contexts - self.merged
            taken = max_BF[: len(self.block_CF) - filled]
            self.block_CF[filled : filled + len(taken)] = taken
            self.contexts += len(taken)
            if filled + len(taken) == len(self.block_CF):
                self._merge()
            max_BF = max_BF[len(taken) :]

    def log10_frequency(self):
        """[F] float32: log10 of the share of tokens each feature fired on, -inf where it never did."""
        return (self.count_F.double() / max(self.tokens, 1)).log10().float().cpu()

    def choose(self, features_F, num_random):
        """The contexts of the features: numbers [F, K], -1 where there are fewer; kind [F, K]; maximum [F].

        No document comes twice for a feature. The random ones are drawn from 4 K contexts that no feature had
        a say in, less the feature's own documents.
        """
        self._merge()
        features_F = features_F.to(self.documents_N.device)
        key_FK = self.top_FK[features_F]
        top_FK = self._context(key_FK).where(key_FK > 0, -1)
        max_F = _value(key_FK[:, 0])
        spread_FK = self._spread(features_F, max_F, top_FK)
        random_FK = self._random(torch.cat([top_FK, spread_FK], 1), num_random)
        parts = [top_FK, spread_FK, random_FK]
        kind_K = torch.tensor([kind for kind, part in enumerate(parts) for _ in range(part.shape[1])])
        return torch.cat(parts, 1).cpu(), kind_K.to(torch.int8).repeat(len(parts[0]), 1), max_F.cpu()

    def _spread(self, features_F, max_F, top_FK):
        feature_P, key_P = torch.cat(self.pool, 1)
        slot_P = torch.searchsorted(features_F, feature_P).clamp_(max=len(features_F) - 1)
        mine_P = features_F[slot_P] == feature_P
        slot_P, feature_P, key_P = slot_P[mine_P], feature_P[mine_P], key_P[mine_P]
        bin_P = (_value(key_P) * (self.num_spread / max_F)[slot_P]).ceil().clamp_(1, self.num_spread) - 1
        rank_P = self._draw(feature_P, key_P) << 32 | self._context(key_P)
        document_P = self.documents_N[self._context(key_P)]
        free_P = torch.ones_like(mine_P[mine_P])
        for used_F in self._document(top_FK).T:
            free_P &= document_P != used_F[slot_P]
        drawn = []
        for number in reversed(range(self.num_spread)):
            here_P = free_P & (bin_P == number)
            first_F = torch.full_like(features_F, -1).scatter_reduce_(
                0, slot_P[here_P], rank_P[here_P], "amin", include_self=False
            )
            drawn.append((first_F & LOW).where(first_F >= 0, -1))
            free_P &= document_P != self._document(drawn[-1])[slot_P]
        drawn_FK = torch.stack(drawn, 1)
        return drawn_FK.gather(1, (drawn_FK < 0).to(torch.int8).argsort(dim=1, stable=True))

    def _random(self, used_FK, num_random):
        order_N = torch.randperm(self.contexts, generator=self.rng)
        of_N = self.documents_N.cpu()[order_N].unique(return_inverse=True)[1]
        first_U = torch.full((int(of_N.max()) + 1,), len(of_N)).scatter_reduce_(
            0, of_N, torch.arange(len(of_N)), "amin"
        )
        wanted = 4 * (used_FK.shape[1] + num_random)
        common_R = order_N[first_U.sort().values[:wanted]].to(used_FK.device)
        lot_FR = torch.rand(len(used_FK), len(common_R), generator=self.rng).to(used_FK.device)
        for used_F in self._document(used_FK).T:
            lot_FR[self.documents_N[common_R] == used_F[:, None]] = 2.0
        lot_FR, order_FR = torch.nn.functional.pad(lot_FR, (0, num_random), value=2.0).sort(1)
        common_R = torch.nn.functional.pad(common_R, (0, num_random), value=-1)
        return common_R[order_FR[:, :num_random]].where(lot_FR[:, :num_random] < 2, -1)

    def _merge(self):
        """Take the block into the top contexts and the pool."""
        context_C = torch.arange(self.merged, self.contexts, device=self.block_CF.device)
        if len(context_C) == 0:
            return
        value_FC = self.block_CF[: len(context_C)].T.contiguous()
        if not value_FC.isfinite().all():
            raise InputError("finite activations needed, the LLM gave others: try --dtype_llm float32")
        self.merged = self.contexts
        key_FC = _key(value_FC, context_C)
        # The best context of each document: within the block, then against what is kept.
        document_U, of_C = self.documents_N[context_C].unique(return_inverse=True)
        best_FU = key_FC.new_zeros(len(key_FC), len(document_U))
        best_FU.scatter_reduce_(1, of_C.expand_as(key_FC), key_FC, "amax")
        old_FK = self.top_FK
        document_FK = self._document(self._context(old_FK).where(old_FK > 0, -1))
        at_FK = torch.searchsorted(document_U, document_FK).clamp_(max=len(document_U) - 1)
        rival_FK = best_FU.gather(1, at_FK).where(document_U[at_FK] == document_FK, 0)
        best_FU.scatter_add_(1, at_FK, -rival_FK.where(rival_FK < old_FK, 0))  # the loser's place becomes 0
        best_FK = old_FK.where(rival_FK < old_FK, 0)
        self.top_FK = torch.cat([best_FK, best_FU], 1).topk(old_FK.shape[1]).values
        least_F1 = self.top_FK[:, -1:]
        out_FC = (key_FC > 0) & ((key_FC < least_F1) | (key_FC != best_FU[:, of_C]))
        out_FK = (old_FK > 0) & ((old_FK < least_F1) | (best_FK == 0))
        cell_FC = torch.bucketize(value_FC * self.scale_F[:, None], self.edges_L)
        draw_FC = (self.draw_F[:, None] * self.draw_N[context_C]) >> 21 & (NEVER - 1)
        out_FC &= draw_FC <= self.limit_FL.gather(1, cell_FC)
        for out, key in ((out_FC, key_FC), (out_FK, old_FK)):
            self.pool.append(torch.stack([out.nonzero()[:, 0], key[out]]))
        if sum(piece.shape[1] for piece in self.pool) > 2 * self.pruned:
            self._prune()

    def _prune(self):
        """Keep what may still win a bin (see the class), and set the limits for what comes."""
        feature_P, key_P = torch.cat(self.pool, 1)
        order_P = key_P.argsort()
        order_P = order_P[feature_P[order_P].argsort(stable=True)]
        feature_P, key_P = feature_P[order_P], key_P[order_P]
        draw_P, value_P = self._draw(feature_P, key_P), _value(key_P)
        max_F = _value(self.top_FK[:, 0])
        width_P = (max_F / self.num_spread)[feature_P]
        kept_P = torch.zeros_like(feature_P, dtype=torch.bool)
        for _ in range(DEPTH):
            rest = (~kept_P).nonzero()[:, 0]
            value = value_P[rest]
            lower, upper = _free_range(feature_P[rest], value, draw_P[rest])
            wide = upper - lower >= 0.999 * width_P[rest]  # 0.999: bins are rounded
            kept_P[rest] = wide & (lower < value) & (value < upper)
        feature_P, key_P = feature_P[kept_P], key_P[kept_P]
        self.pool, self.pruned = [torch.stack([feature_P, key_P])], len(key_P)
        self.scale_F = 2 * self.num_spread / max_F.clamp(min=1e-30)
        self.limit_FL = self._limits(feature_P, value_P[kept_P], draw_P[kept_P])

    def _limits(self, feature_P, value_P, draw_P):
        """[F, L]: the draw above which a context in a cell of the feature's range wins no bin.

        A window that holds the context covers its cell or one of the two beside it, whole: with DEPTH lower
        draws in each of the three there are as many in the window.
        """
        cells = self.limit_FL.shape[1]
        cell_P = feature_P * cells + torch.bucketize(value_P * self.scale_F[feature_P], self.edges_L)
        own = draw_P.new_full((self.limit_FL.numel(),), -1)
        for _ in range(DEPTH):
            higher_P = draw_P.where(draw_P > own[cell_P], NEVER)
            own = torch.full_like(own, NEVER).scatter_reduce_(0, cell_P, higher_P, "amin")
        own_FL = own.view(-1, cells)
        limit_FL = torch.maximum(own_FL, torch.maximum(own_FL.roll(1, 1), own_FL.roll(-1, 1)))
        limit_FL[:, :2] = own_FL[:, :2].amin(1, keepdim=True)  # the first bin always covers both
        limit_FL[:, -2] = own_FL[:, -3:-1].amax(1)  # nothing lies between it and the maximum
        limit_FL[:, -1] = NEVER
        return limit_FL.int()

    def _context(self, key):
        return (LOW - (key & LOW)).clamp_(max=len(self.documents_N) - 1)

    def _document(self, context):
        """The document of each context, -1 for context -1."""
        return self.documents_N[context.clamp(min=0)].where(context >= 0, -1)

    def _draw(self, feature_P, key_P):
        return (self.draw_F[feature_P] * self.draw_N[self._context(key_P)]) >> 21 & (NEVER - 1)


def _key(value_FC, context_C):
    """int64 that sorts by activation, then by falling context number: unique. 0 where nothing fires."""
    bits_FC = value_FC.view(torch.int32).long() << 32
    return (bits_FC | (LOW - context_C)).where(value_FC > 0, 0)


def _value(key):
    return (key >> 32).int().view(torch.float32)


def _free_range(feature_P, value_P, draw_P):
    """Around each candidate the values between which its feature has no lower draw: 0 and inf at the most.

    Candidates are sorted by feature, then by value.
    """
    ends = []
    for sign in (-1, 1):
        near = torch.arange(len(draw_P) + 2, device=draw_P.device) + sign
        # A fence at each end of the row, lower than every draw; features end where the next begins.
        draw = torch.nn.functional.pad(draw_P, (1, 1), value=-1)
        feature = torch.nn.functional.pad(feature_P, (1, 1), value=-1)
        todo = torch.arange(1, len(draw_P) + 1, device=draw_P.device)
        while len(todo):
            at = near[todo]
            todo = todo[(draw[at] > draw[todo]) & (feature[at] == feature[todo])]
            near[todo] = near[near[todo]]
        at = near[1:-1]
        value = torch.nn.functional.pad(value_P, (1, 1))[at]
        ends.append(value.where(feature[at] == feature_P, 0.0 if sign < 0 else math.inf))
    return ends
