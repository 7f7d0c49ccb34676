"""What a checkpoint is judged by, on documents that training never sees.

Dims: M held-out contexts, B contexts of a batch, T tokens, V vocabulary, N rows, D the hookpoint's width,
F features, C token classes.
"""

import functools

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from sae import InputError
from sae.activations import on_output
from sae.processes import ALONE
from sae.training.probe import CLASSES, probe_f1

KL_CONTEXTS = 64  # it needs the LLM's own predictions again each time, and varies little between contexts
SLICE = 1024  # rows that go through the autoencoder at once


def split_held_out(documents, count, seed):
    """Rows to train on, ascending, and about `count` rows to judge by, shuffled. documents: [rows].

    Whole documents are drawn from all over the dataset, a tenth of it at most, and from each of them equally
    many contexts; what else they hold is left out. Raises InputError where nothing is left to train on.
    """
    rng = np.random.default_rng([seed, 4])
    numbers, sizes = np.unique(documents, return_counts=True)
    if len(numbers) < 2:
        raise InputError("contexts of at least 2 documents needed, one of them held out; the dataset has 1")
    order = rng.permutation(len(numbers))
    fits = np.searchsorted(sizes[order].cumsum(), len(documents) // 10, side="right")
    drawn = order[: min(fits, count)] if fits else [sizes.argmin()]
    rows = [rng.permutation(np.flatnonzero(documents == numbers[one])) for one in drawn]
    held_out = np.concatenate([some[: -(-count // len(rows))] for some in rows])
    return np.flatnonzero(~np.isin(documents, numbers[drawn])), rng.permutation(held_out)[:count]


class Judge:
    """Judges autoencoders on the same contexts again and again; what does not change is computed once.

    ids_MT: the contexts; documents_M: the document of each; classes_MT: of each token, a number of
    `probe.CLASSES` or -1. Positions before `skip_positions` stay as the LLM made them.

    Several processes (`here`) take batches in turn; each encodes the rows of all with its own features.
    """

    def __init__(
        self, model, module, ids_MT, documents_M, classes_MT=None, skip_positions=0, batch_size=16, here=ALONE
    ):
        self._model, self._module, self._skip, self._batch_size = model, module, skip_positions, batch_size
        self._here, self._ids_MT = here, ids_MT
        self._ce_M = self._ce_zero_M = None  # of this process's contexts, 0 for the others'
        _, self._documents_M = np.unique(documents_M, return_inverse=True)
        # Half of the documents chooses the features of a class, the other scores them.
        halves_M1 = torch.from_numpy(self._documents_M % 2)[:, None]
        classes_MT = torch.full_like(ids_MT, -1) if classes_MT is None else classes_MT
        self._labels_MT = halves_M1 * (len(CLASSES) + 1) + classes_MT % (len(CLASSES) + 1)

    @torch.inference_mode()
    def figures(self, autoencoders):
        """For each autoencoder a dict of its figures, as metrics.jsonl keeps them; None where undefined.

        explained_variance = 1 - sum ||x - x'||^2 / sum ||x - mean(x)||^2; ce, ce_sae, ce_zero: cross-entropy
        of the LLM as it is, with the reconstruction and with zeros in place; kl: KL divergence of its
        predictions with the reconstruction from its own, over KL_CONTEXTS; all in nats per predicted token.
        loss_recovered = (ce_zero - ce_sae) / (ce_zero - ce), with the 95% interval over documents.
        """
        contexts, size, here = len(self._ids_MT), self._batch_size, self._here
        tallies, first = [_Tally(one, self._skip, contexts) for one in autoencoders], self._ce_M is None
        if first:
            self._ce_M, self._ce_zero_M = np.zeros(contexts), np.zeros(contexts)
        rounds = range(0, contexts, size * here.count)
        for start in tqdm(rounds, "judging", unit="round", position=2, leave=False, disable=here.rank > 0):
            turns = [slice(at, at + size) for at in range(start, start + size * here.count, size)]
            own, labels = turns[here.rank], [self._labels_MT[turn, self._skip :].flatten() for turn in turns]
            ids_BT, compared = self._ids_MT[own], max(0, KL_CONTEXTS - own.start)
            if not len(ids_BT):  # in the last round; the others still need this process's features
                for tally in tallies:
                    tally.replaced(torch.empty(0, self._skip, 1), labels)
                continue
            if first:
                self._ce_zero_M[own] = _cross_entropies(self._logits(ids_BT, self._zero), ids_BT)
            if first or compared:
                own_BTV = self._logits(ids_BT, lambda _acts: None)
                self._ce_M[own] = _cross_entropies(own_BTV, ids_BT)
            for tally in tallies:
                logits_BTV = self._logits(ids_BT, functools.partial(tally.replaced, labels=labels))
                tally.ce_M[own] = _cross_entropies(logits_BTV, ids_BT)
                if compared:
                    tally.kl_M[own] = _divergences(own_BTV[:compared], logits_BTV[:compared])
        return [self._figures(tally) for tally in tallies]

    def _figures(self, tally):
        sums = {"ce": self._ce_M, "ce_sae": tally.ce_M, "ce_zero": self._ce_zero_M, "kl": tally.kl_M}
        sums = {name: self._here.total(torch.tensor(sum_M)).numpy() for name, sum_M in sums.items()}
        predicted = max(1, self._ids_MT.shape[1] - 1)
        by_document = (np.bincount(self._documents_M, sums[name]) for name in ("ce", "ce_sae", "ce_zero"))
        return {
            **tally.figures(),
            **{name: float(sum_M.mean()) / predicted for name, sum_M in sums.items()},
            **_recovered(*by_document),
            "documents": int(self._documents_M.max()) + 1,
            "contexts": len(self._ids_MT),
        }

    def _logits(self, ids_BT, hook):
        with on_output(self._module, ids_BT.shape, hook):
            return self._model(input_ids=ids_BT.to(self._model.device), use_cache=False).logits

    def _zero(self, acts_BTD):
        return _with_rows(acts_BTD, torch.zeros_like(acts_BTD[:, self._skip :]), self._skip)


class _Tally:
    """What one autoencoder makes of the rows."""

    def __init__(self, autoencoder, skip_positions, contexts):
        self._autoencoder, self._skip, self._here = autoencoder, skip_positions, autoencoder.here
        D, F = len(autoencoder.b_dec), len(autoencoder.b_enc)
        self._labels, device = 2 * (len(CLASSES) + 1), autoencoder.b_dec.device
        self._total_D = torch.zeros(D, dtype=torch.float64, device=device)
        self._fired_LF = torch.zeros(self._labels, F, dtype=torch.float64, device=device)
        self._rows_L = torch.zeros(self._labels, dtype=torch.float64, device=device)
        self._error = self._squares = 0
        self.ce_M, self.kl_M = np.zeros(contexts), np.zeros(min(contexts, KL_CONTEXTS))

    def replaced(self, acts_BTD, labels):
        """The activations with the reconstruction in place; counts. labels: of each process's rows [N]."""
        x_ND, b_dec, parts = acts_BTD[:, self._skip :].flatten(0, 1), self._autoencoder.b_dec, []
        for rank, labels_N in enumerate(labels):
            for start in range(0, len(labels_N), SLICE):
                some_N = labels_N[start : start + SLICE]
                if rank == self._here.rank:
                    some_ND = x_ND[start : start + SLICE].to(b_dec)
                else:
                    some_ND = b_dec.new_zeros(len(some_N), len(b_dec))
                out_ND = self._count(self._here.total(some_ND), some_N)
                if rank == self._here.rank:
                    parts.append(out_ND)
        return _with_rows(acts_BTD, torch.cat(parts), self._skip) if parts else None

    def _count(self, x_ND, labels_N):
        autoencoder = self._autoencoder
        f_NF = autoencoder.features(x_ND)
        out_ND = autoencoder.decode(f_NF) / autoencoder.scale(x_ND)
        self._error += (x_ND - out_ND).double().square().sum()
        self._squares += x_ND.double().square().sum()
        self._total_D += x_ND.double().sum(0)
        labels_NL = functional.one_hot(labels_N.to(x_ND.device), self._labels).float()
        self._fired_LF += labels_NL.T @ (f_NF > 0).float()
        self._rows_L += labels_NL.sum(0)
        return out_ND

    def figures(self):
        rows, fired_FL = self._rows_L.sum(), self._here.whole(self._fired_LF.T, 0)
        if fired_FL is None:
            return {}  # the first process has them all
        spread = self._squares - self._total_D.square().sum() / rows
        fired_2CF = fired_FL.T.to(rows.device).unflatten(0, (2, -1))
        return {
            "l0": float(fired_2CF.sum() / rows),
            "explained_variance": float(1 - self._error / spread) if spread > 0 else None,
            "probe_f1": probe_f1(fired_2CF, self._rows_L.unflatten(0, (2, -1))),
        }


def _with_rows(acts_BTD, rows_ND, skip_positions):
    new_BTD = acts_BTD.clone()
    new_BTD[:, skip_positions:] = rows_ND.to(acts_BTD).view_as(new_BTD[:, skip_positions:])
    return new_BTD


def _cross_entropies(logits_BTV, ids_BT):
    """Sum of each context, nats; the logits of one context at a time are turned to float32."""
    pairs = zip(logits_BTV[:, :-1], ids_BT[:, 1:].to(logits_BTV.device), strict=True)
    return [functional.cross_entropy(got.float(), want, reduction="sum").item() for got, want in pairs]


def _divergences(own_BTV, logits_BTV):
    """KL(own || other) of the predictions, summed over each context, nats."""
    pairs = zip(own_BTV[:, :-1], logits_BTV[:, :-1], strict=True)
    logs = ([one.float().log_softmax(-1) for one in pair] for pair in pairs)
    return [functional.kl_div(other, own, reduction="sum", log_target=True).item() for own, other in logs]


def _recovered(ce_K, ce_sae_K, ce_zero_K):
    """loss_recovered and its 95% interval, from the cross-entropies of each of K documents.

    A ratio of sums: its error is that of the sum of what each document is off it, by Student's t.
    """
    gap_K, won_K, freedom = ce_zero_K - ce_K, ce_zero_K - ce_sae_K, len(ce_K) - 1
    share = float(won_K.sum() / gap_K.sum()) if gap_K.sum() else None
    if share is None or not freedom:
        return {"loss_recovered": share, "loss_recovered_interval": None}
    off_K, z = won_K - share * gap_K, 1.96
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    half = t * float(np.sqrt((off_K**2).sum() * len(off_K) / freedom) / abs(gap_K.sum()))
    return {"loss_recovered": share, "loss_recovered_interval": [share - half, share + half]}
