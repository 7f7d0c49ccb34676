"""What is to be explained: files that belong together, and which contexts serve which purpose.

Dims: F features, K kept contexts of a feature, T looked-at tokens of a context.
"""

import random
from pathlib import Path
from typing import NamedTuple

import torch

from sae import InputError
from sae.artifacts import check_origin, fingerprint
from sae.explanations import prompts
from sae.samples import RANDOM, SPREAD, TOP, Samples, load_samples, only

JUDGING = 2  # top contexts, and as many others, that choose among several explanations


class Material(NamedTuple):
    samples: Samples
    dataset: object
    tokenizer: object  # of the dataset
    samples_fingerprint: str

    def origin(self, interpretation_model, simulation, settings):
        """The fields of a document that say where it comes from, the same for all features.

        `settings`: in words, whatever else decides the result.
        """
        samples = self.samples
        return {
            "layer": samples.config["layer_id"],
            "model": samples.config["model_name"],
            "layer_type": samples.config["layer_type"],
            "hookpoint": samples.config["hookpoint"],
            "interpretation_model": interpretation_model,
            "simulation": simulation,
            "settings": settings,
            "dataset_fingerprint": samples.dataset_fingerprint,
            "autoencoder_fingerprint": samples.autoencoder_fingerprint,
            "samples_fingerprint": self.samples_fingerprint,
        }


def open_material(samples_path, dataset_path, autoencoder_path, dims=()):
    """The Material of a run, of the features `dims` alone where some are given.

    Raises InputError unless samples, dataset and autoencoder belong together.
    """
    from sae.tokens import load_tokenizer, open_dataset

    samples = load_samples(samples_path)
    dataset, info = open_dataset(dataset_path)
    what = f"the samples file {samples_path}"
    check_origin(what, samples.dataset_fingerprint, info["fingerprint"], dataset_path)
    if not Path(autoencoder_path).is_file():
        raise InputError(f"an autoencoder checkpoint needed at {autoencoder_path}, no such file")
    check_origin(what, samples.autoencoder_fingerprint, fingerprint(autoencoder_path), autoencoder_path)
    samples = only(samples, dims) if dims else samples
    return Material(samples, dataset, load_tokenizer(dataset_path, info), fingerprint(samples_path))


class Context(NamedTuple):
    row: int  # of the dataset
    texts: list[str]  # of the T tokens
    values_T: torch.Tensor  # the feature's activations, float32, unscaled

    def visible(self):
        return [prompts.visible(text) for text in self.texts]


class Feature(NamedTuple):
    dim: int
    log10_frequency: float
    max_activation: float
    shown: list[Context]
    judging: list[Context]
    scored: list[Context]


class Roles(NamedTuple):
    """What a feature's contexts serve for (places among its K); no document serves two purposes."""

    shown: list[int]  # to the interpreter, the strongest first
    judging: list[int]  # which of several explanations is kept
    scored: list[int]


def roles(kind_K, rows_K, peak_K, document_K, num_shown, num_scored, num_judging=0):
    """The Roles of a feature's contexts.

    The top contexts are dealt out in turn, so that shown and scored ones are alike; `num_scored` of them and
    as many random ones are scored. Contexts spread over the range fill up where a role has too few.
    """
    owner, taken = {}, ([], [], [])
    there = [k for k in range(len(rows_K)) if rows_K[k] >= 0]
    fires = [[k for k in there if kind_K[k] == kind and peak_K[k] > 0] for kind in (TOP, SPREAD)]
    drawn = [k for k in there if kind_K[k] == RANDOM]

    def deal(places, most):
        """In turn to the role with the smallest part of what it may have."""
        for k in places:
            open_roles = [r for r in range(3) if len(taken[r]) < most[r]]
            open_roles = [r for r in open_roles if owner.get(document_K[k], r) == r and k not in taken[r]]
            if open_roles and not any(k in places_taken for places_taken in taken):
                role = min(open_roles, key=lambda r: len(taken[r]) / most[r])
                owner[document_K[k]] = role
                taken[role].append(k)

    for places in fires:
        deal(places, (num_shown, num_judging, num_scored))
    firing = [len(places) for places in taken]
    deal(drawn, (0, firing[1] + num_judging, firing[2] + num_scored))
    if num_judging:  # several explanations: the more contexts to choose from the better
        deal(fires[0] + fires[1], (len(rows_K), 0, 0))
    return Roles(*taken)


def selections(shown, size, count, seed):
    """`count` ways to choose `size` of the contexts `shown`: the strongest, then random ones."""
    rng = random.Random(seed)
    return [shown[:size]] + [
        sorted(rng.sample(shown, min(size, len(shown))), key=shown.index) for _ in range(count - 1)
    ]


def groups(features, size):
    """Features in lists of `size`, fixed by their order; a last one of its own joins the list before.

    A group is explained together and its features control each other: the documents do not depend on how
    many processes share the groups, nor on where a run was interrupted.
    """
    parts = [features[start : start + size] for start in range(0, len(features), size)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [parts[-2] + parts[-1]]
    return parts


class Plan:
    """Which contexts explain and score each feature of the samples, in which groups; contexts as text.

    `dataset`: the tokenised dataset that the samples are from, `tokenizer`: its tokenizer.
    """

    def __init__(self, material, num_shown, num_scored, num_explanations, group_size, most=0):
        self._samples, self._dataset, self._tokenizer, _ = material
        samples = self._samples
        self._skip = samples.config.get("skip_positions", 0)
        document = self._dataset.with_format("numpy")["document"][:]
        num_judging = JUDGING if num_explanations > 1 else 0
        count = min(most or len(samples.features), len(samples.features))
        peak_FK = samples.activations[:count].amax(-1)
        self._roles = [
            roles(
                samples.kind[f].tolist(), samples.rows[f].tolist(), peak_FK[f].tolist(),
                document[samples.rows[f]].tolist(), num_shown, num_scored, num_judging,
            )
            for f in range(count)
        ]  # fmt: skip
        self.count, self.group_size = count, group_size
        self.groups = groups(list(range(count)), group_size)  # places in the samples
        self.rows_of_groups = [
            [int(samples.rows[f, k]) for f in group for k in self._roles[f].scored + self._roles[f].judging]
            for group in self.groups
        ]

    def dims(self, group):
        return self._samples.features[group].tolist()

    def texts(self, row):
        """The looked-at tokens of a context as text."""
        length = self._samples.activations.shape[-1]
        ids = self._dataset[int(row)]["input_ids"][self._skip : length]
        return prompts.token_texts(self._tokenizer, ids)

    def visible(self, row):
        return [prompts.visible(text) for text in self.texts(row)]

    def feature(self, f):
        """The Feature at place `f` of the samples."""
        samples = self._samples
        contexts = [
            [
                Context(row, self.texts(row), samples.activations[f, k, self._skip :].float())
                for k in places
                for row in [int(samples.rows[f, k])]
            ]
            for places in self._roles[f]
        ]
        dim = int(samples.features[f])
        frequency, peak = samples.log10_frequency[dim].item(), samples.max_activation[f].item()
        return Feature(dim, frequency, peak, *contexts)
