"""What a checkpoint is judged by, on held-out contexts: L0, explained variance, loss recovered.

Dims: B contexts, T tokens, V vocabulary, N rows, D the hookpoint's width.
"""

import numpy as np
import torch
from torch.nn import functional

from sae import InputError
from sae.activations import on_output

HELD_OUT = 64  # contexts, or a twentieth of a small dataset
SLICE = 1024  # rows that go through the autoencoder at once


def split_held_out(documents):
    """Rows to train on and rows to judge by (the last ones), no document in both. documents: [rows]."""
    held_out = np.arange(len(documents))[-min(HELD_OUT, max(1, len(documents) // 20)) :]
    training = np.flatnonzero(~np.isin(documents, documents[held_out]))
    if len(training) == 0:
        raise InputError("contexts of at least 2 documents needed, one of them held out; the dataset has 1")
    return training, held_out


@torch.inference_mode()
def evaluate(model, module, autoencoder, contexts, skip_positions=0):
    """Figures over batches of ids [B, T]; positions before `skip_positions` are left as the LLM made them.

    explained_variance = 1 - sum ||x - x'||^2 / sum ||x - mean(x)||^2. loss_recovered =
    (ce_zero - ce_sae) / (ce_zero - ce), cross-entropies in nats per predicted token; None where undefined.
    """
    device = autoencoder.b_dec.device
    fired = error = squares = rows = 0
    total_D = torch.zeros(len(autoencoder.b_dec), dtype=torch.float64, device=device)
    losses = {"ce": 0.0, "ce_sae": 0.0, "ce_zero": 0.0}
    predicted = 0

    def reconstruct(acts_BTD):
        nonlocal fired, error, squares, rows, total_D
        parts = []
        for x_ND in acts_BTD[:, skip_positions:].flatten(0, 1).split(SLICE):
            x_ND = x_ND.to(device, torch.float32)
            f_NF = autoencoder.features(x_ND)
            out_ND = autoencoder.decode(f_NF) / autoencoder.scale(x_ND)
            fired += (f_NF > 0).sum()
            error += (x_ND - out_ND).double().square().sum()
            squares += x_ND.double().square().sum()
            total_D += x_ND.double().sum(0)
            rows += len(x_ND)
            parts.append(out_ND.to(acts_BTD))
        return _with_rows(acts_BTD, torch.cat(parts), skip_positions)

    def zero(acts_BTD):
        return _with_rows(acts_BTD, torch.zeros_like(acts_BTD[:, skip_positions:]), skip_positions)

    for ids_BT in contexts:
        for name, hook in (("ce", lambda _: None), ("ce_sae", reconstruct), ("ce_zero", zero)):
            with on_output(module, ids_BT.shape, hook):
                losses[name] += _cross_entropy(model, ids_BT)
        predicted += ids_BT[:, 1:].numel()
    spread = squares - total_D.square().sum() / rows
    figures = {name: loss / max(1, predicted) for name, loss in losses.items()}
    gap = figures["ce_zero"] - figures["ce"]
    return {
        "l0": float(fired / rows),
        "explained_variance": float(1 - error / spread) if spread > 0 else None,
        **figures,
        "loss_recovered": (figures["ce_zero"] - figures["ce_sae"]) / gap if gap else None,
    }


def _with_rows(acts_BTD, rows_ND, skip_positions):
    new_BTD = acts_BTD.clone()
    new_BTD[:, skip_positions:] = rows_ND.to(acts_BTD).view_as(new_BTD[:, skip_positions:])
    return new_BTD


def _cross_entropy(model, ids_BT):
    """Sum over the batch, nats; the logits of one context at a time are turned to float32."""
    ids_BT = ids_BT.to(model.device)
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    pairs = zip(logits_BTV[:, :-1], ids_BT[:, 1:], strict=True)
    return sum(functional.cross_entropy(got.float(), want, reduction="sum").item() for got, want in pairs)
