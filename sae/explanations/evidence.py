"""What is to be explained: files that belong together, and which contexts serve which purpose.

Dims: F features, K kept contexts of a feature, T looked-at tokens of a context.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from sae import InputError
from sae.artifacts import check_origin, fingerprint
from sae.explanations.prompts import token_texts, typed, visible
from sae.samples import RANDOM, SPREAD, TOP, Samples, load_samples, only

JUDGING = 4  # top contexts, and as many others, that choose among several explanations


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


def open_material(samples_path, dataset_path, autoencoder_path):
    """The Material of a run. Raises InputError unless samples, dataset and autoencoder belong together."""
    from sae.tokens import load_tokenizer, open_dataset

    samples = load_samples(samples_path)
    dataset, info = open_dataset(dataset_path)
    what = f"the samples file {samples_path}"
    check_origin(what, samples.dataset_fingerprint, info["fingerprint"], dataset_path)
    if not Path(autoencoder_path).is_file():
        raise InputError(f"an autoencoder checkpoint needed at {autoencoder_path}, no such file")
    check_origin(what, samples.autoencoder_fingerprint, fingerprint(autoencoder_path), autoencoder_path)
    return Material(samples, dataset, load_tokenizer(dataset_path, info), fingerprint(samples_path))


class Context(NamedTuple):
    row: int  # of the dataset
    texts: list[str]  # of the T tokens
    values_T: torch.Tensor  # the feature's activations, float32, unscaled

    def visible(self):
        return [visible(text) for text in self.texts]

    def around_peak(self, tokens):
        """This context, or so many tokens of it with the strongest in the middle."""
        start = max(0, min(int(self.values_T.argmax()) - tokens // 2, len(self.texts) - tokens))
        return Context(self.row, self.texts[start : start + tokens], self.values_T[start : start + tokens])

    def document(self):
        """The part of a document: the text, and where in it the tokens stand on which the feature fires."""
        marks, at = [], 0
        for text, value in zip(self.texts, self.values_T.tolist(), strict=True):
            if value > 0:
                marks.append([at, at + len(text)])
            at += len(text)
        return {"row": self.row, "text": "".join(self.texts), "marks": marks}


class Feature(NamedTuple):
    dim: int
    log10_frequency: float
    max_activation: float
    shown: list[Context]
    judging: list[Context]
    scored: list[Context]
    hard: list[Context]  # silent, where features of nearly the same direction fire


def fired_on(contexts):
    """The distinct tokens with an activation, strongest first, as people type them."""
    strongest = {}
    for context in contexts:
        for text, value in zip(context.texts, context.values_T.tolist(), strict=True):
            if value > 0:
                strongest[typed(text)] = max(value, strongest.get(typed(text), 0))
    return sorted(strongest, key=lambda text: -strongest[text])


class Roles(NamedTuple):
    """What a feature's contexts serve for (places among its K); no document serves two purposes."""

    shown: list[int]  # to those who explain, the strongest first
    judging: list[int]  # which of several explanations is kept
    scored: list[int]


def roles(kind_K, rows_K, peak_K, document_K, num_shown, num_scored, num_judging=0):
    """The Roles of a feature's contexts.

    The top contexts are dealt out in turn, so that shown and scored ones are alike; `num_scored` of them and
    as many random ones are scored. Contexts spread over the range fill up where a role has too few.
    """
    owner, taken = {}, ([], [], [])
    there = [k for k in range(len(rows_K)) if rows_K[k] >= 0]

    def deal(places, most):
        """Each context to the role that is least filled; all of one document to the same role."""
        for k in places:
            free = [r for r in range(3) if len(taken[r]) < most[r] and owner.get(document_K[k], r) == r]
            if free:
                role = min(free, key=lambda r: len(taken[r]) / most[r])
                owner[document_K[k]] = role
                taken[role].append(k)

    for kind in (TOP, SPREAD):
        firing = [k for k in there if kind_K[k] == kind and peak_K[k] > 0]
        deal(firing, (num_shown, num_judging, num_scored))
    drawn = [k for k in there if kind_K[k] == RANDOM]
    deal(drawn, (0, len(taken[1]) + num_judging, len(taken[2]) + num_scored))
    return Roles(*taken)


def evenly(items, count):
    """`count` of the items at even steps, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    steps = torch.linspace(0, len(items) - 1, count).round().long().tolist()
    return [items[step] for step in steps]


class Plan:
    """Which contexts explain and score each feature of the samples, in which groups; contexts as text.

    A feature is named by its place in the samples file. `dims`: the features to explain (none: all).
    """

    def __init__(self, material, chosen, dims=(), most=0):
        self.samples, self._dataset, self._tokenizer, _ = material
        self.settings = chosen
        self._document = self._dataset.with_format("numpy")["document"][:]
        self.total = len(self.samples.features)
        if dims:
            only(self.samples, dims)  # refuses those that are not there
        wanted = [f for f in range(self.total) if not dims or int(self.samples.features[f]) in set(dims)]
        wanted, size = wanted[: most or None], chosen.batch_size
        self.groups = [wanted[start : start + size] for start in range(0, len(wanted), size)]
        self.count = len(wanted)
        self._texts = {}

    def pending(self, done):
        """The numbers of the groups whose features are not all among `done`."""
        dims = [set(self.samples.features[group].tolist()) for group in self.groups]
        return [number for number, group in enumerate(dims) if not group <= done]

    def feature(self, f):
        """The Feature at place `f` of the samples."""
        samples, chosen = self.samples, self.settings
        rows_K, skip = samples.rows[f], samples.config.get("skip_positions", 0)
        acts_KT = samples.activations[f, :, skip:].float()
        dealt = roles(
            samples.kind[f].tolist(), rows_K.tolist(), acts_KT.amax(-1).tolist(),
            self._document[rows_K].tolist(), chosen.num_interpretation_samples,
            chosen.num_simulation_samples, JUDGING if chosen.num_explanations > 1 else 0,
        )  # fmt: skip

        def context(row, values_T):
            return Context(row, self._texts_of(row, skip), values_T).around_peak(chosen.context_tokens)

        contexts = [[context(int(rows_K[k]), acts_KT[k]) for k in places] for places in dealt]
        rows = [] if samples.hard_rows is None else [row for row in samples.hard_rows[f].tolist() if row >= 0]
        silent = [context(row, torch.zeros_like(acts_KT[0])) for row in rows]
        dim = int(samples.features[f])
        frequency, peak = samples.log10_frequency[dim].item(), samples.max_activation[f].item()
        return Feature(dim, frequency, peak, *contexts, silent)

    def others(self, f):
        """The places of all other features of the samples, in a circle from `f` on."""
        return [(f + step) % self.total for step in range(1, self.total)]

    def effects(self, f):
        """The fields promotes and suppresses: the tokens whose logits the feature raises and lowers most."""
        ids = {"promotes": self.samples.promoted, "suppresses": self.samples.suppressed}
        of = {field: [] if ids_FK is None else ids_FK[f].tolist() for field, ids_FK in ids.items()}
        return {field: list(map(typed, token_texts(self._tokenizer, some))) for field, some in of.items()}

    def _texts_of(self, row, skip):
        """The looked-at tokens of a context as text."""
        ids = self._dataset[row]["input_ids"][skip : self.samples.activations.shape[-1]]
        new = [id for id in dict.fromkeys(ids) if id not in self._texts]
        self._texts |= zip(new, token_texts(self._tokenizer, new), strict=True)
        return [self._texts[id] for id in ids]
