"""The samples file: which features, and the contexts that show what each does."""

from typing import NamedTuple

import torch

from sae import InputError
from sae.artifacts import load_pt, save_pt

TOP, SPREAD, RANDOM = 0, 1, 2


class Samples(NamedTuple):
    """Dims: F selected features, ascending, K kept contexts, T tokens, H hard rows, P promoted tokens.

    Fields with a default are absent from older files, and where there is nothing to say.
    """

    config: dict  # of the autoencoder, plus the run's own values
    dataset_fingerprint: str
    autoencoder_fingerprint: str
    num_tokens_seen: int
    log10_frequency: torch.Tensor  # [dict_vec_size] float32, -inf where a feature never fired
    features: torch.Tensor  # [F] int64
    max_activation: torch.Tensor  # [F] float32
    rows: torch.Tensor  # [F, K] int64, dataset row of each kept context, -1 where there are fewer
    activations: torch.Tensor  # [F, K, T] float16, unscaled; 0 at the skipped positions
    kind: torch.Tensor  # [F, K] int8, TOP | SPREAD | RANDOM in this order, the first two strongest first
    # [F, H] int64, dataset rows where the features of the nearest decoder rows fire, this one does not; or -1
    hard_rows: torch.Tensor | None = None
    promoted: torch.Tensor | None = None  # [F, P] int64, token ids, the strongest first; suppressed alike
    suppressed: torch.Tensor | None = None
    promoted_logits: torch.Tensor | None = None  # [F, P] float32, up to the scale of the final norm
    suppressed_logits: torch.Tensor | None = None


def save_samples(path, samples):
    save_pt(path, {field: value for field, value in samples._asdict().items() if value is not None})


def load_samples(path):
    """Read what `save_samples` wrote."""
    needed = [field for field in Samples._fields if field not in Samples._field_defaults]
    content = load_pt(path, "an interpretation samples file", needed)
    return Samples(**{field: content[field] for field in Samples._fields if field in content})


def only(samples, dims):
    """The Samples of these features alone; InputError names those that were not selected."""
    missing = sorted(set(dims) - set(samples.features.tolist()))
    if missing:
        raise InputError(f"features of the samples needed, {', '.join(map(str, missing))} are not among them")
    chosen_F, fields = torch.isin(samples.features, torch.tensor(dims)), Samples._fields[5:]  # of features
    chosen = {name: value[chosen_F] for name in fields if (value := getattr(samples, name)) is not None}
    return samples._replace(**chosen)
