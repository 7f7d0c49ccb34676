"""The samples file: which features, and the contexts that show what each does.

Dims: F selected features, K kept contexts of a feature, T tokens of a context.
"""

from typing import NamedTuple

import torch

from sae import InputError
from sae.artifacts import load_pt, save_pt

TOP, SPREAD, RANDOM = 0, 1, 2


class Samples(NamedTuple):
    """Dims: F selected features in ascending order, K kept contexts, T tokens of a context."""

    config: dict  # of the autoencoder, plus the run's own values
    dataset_fingerprint: str
    autoencoder_fingerprint: str
    num_tokens_seen: int
    log10_frequency: torch.Tensor  # [dict_vec_size] float32, -inf where a feature never fired
    features: torch.Tensor  # [F] int64
    max_activation: torch.Tensor  # [F] float32
    rows: torch.Tensor  # [F, K] int64, dataset row of each kept context, -1 where there are fewer
    activations: torch.Tensor  # [F, K, T] float16, unscaled; 0 at the skipped positions
    kind: torch.Tensor  # [F, K] int8, TOP | SPREAD | RANDOM; top first, by maximum activation, descending


def save_samples(path, samples):
    save_pt(path, samples._asdict())


def load_samples(path):
    """Read what `save_samples` wrote."""
    content = load_pt(path, "an interpretation samples file", Samples._fields)
    return Samples(**{field: content[field] for field in Samples._fields})


def only(samples, dims):
    """The Samples of these features alone; InputError names those that were not selected."""
    missing = sorted(set(dims) - set(samples.features.tolist()))
    if missing:
        raise InputError(f"features of the samples needed, {', '.join(map(str, missing))} are not among them")
    chosen_F = torch.isin(samples.features, torch.tensor(dims))
    parts = ("features", "max_activation", "rows", "activations", "kind")
    return samples._replace(**{part: getattr(samples, part)[chosen_F] for part in parts})
