"""The feature browser: everything there is to see about one run or several, in one HTML file.

This module gathers, page.js shows. Dims: F features of the samples, K contexts kept of each, T tokens of a
context, C distinct contexts, N pairs of a feature and one of its contexts that the page holds, S of them with
simulated activations.
"""

import base64
import gzip
import hashlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps

from sae import InputError

TOP, SPREAD, RANDOM = 0, 1, 2  # as in sae.samples, which would import torch
SHOWN, SCORED, SIMULATED = 1, 2, 3  # what a context served for; SIMULATED: scored, the simulation is known
NEAR = 6  # features beside each
MOST_BYTES = 29_000_000
# Of a document: what the page has from elsewhere, or has no use for.
LEFT_OUT = {
    "dim", "shown", "scored", "simulated", "tokens", "settings", "time", "layer", "layer_type", "model",
    "hookpoint", "log10_frequency", "max_activation", "samples_fingerprint", "dataset_fingerprint",
    "autoencoder_fingerprint",
}  # fmt: skip


# JSON that no text in it can end or leave: safe inside <script type="application/json">.
as_data = partial(htmlsafe_json_dumps, separators=(",", ":"), allow_nan=False)


class Run(NamedTuple):
    """One samples file and what belongs to it."""

    samples: object  # sae.samples.Samples
    journal: dict  # {feature: its document}
    near: list | None  # of each feature the closest rows of W_dec: [(feature, cosine)]
    metrics: dict
    context_FK: np.ndarray  # index into tokens_CT, -1 for none
    tokens_CT: np.ndarray  # index into `texts`
    texts: list  # of the tokens that occur
    effects: list  # per feature its promoted and its suppressed tokens: [(index into `texts`, logit), ...]


def top_tokens(ids_KT, acts_KT, count=10):
    """What a feature fires on most: [(token id, share of its activation, times it fired, times seen)]."""
    tokens, where = np.unique(ids_KT, return_inverse=True)
    where, acts = where.ravel(), acts_KT.ravel().astype("float64")
    strength, total = np.bincount(where, acts), max(acts.sum(), 1e-12)
    fired, seen = np.bincount(where, acts > 0), np.bincount(where)
    best = [i for i in np.argsort(-strength, kind="stable")[:count] if strength[i] > 0]
    return [(int(tokens[i]), round(strength[i] / total, 4), int(fired[i]), int(seen[i])) for i in best]


def columns_shown(kind_K, most):
    """Which of the K columns to show: up to `most` of each kind, of the spread ones at even steps."""
    shown = []
    for kind in (TOP, SPREAD, RANDOM):
        there = np.flatnonzero(kind_K == kind)
        steps = np.linspace(0, len(there) - 1, min(most, len(there))).round().astype(int)
        shown.append(there[steps] if kind == SPREAD else there[:most])
    return np.concatenate(shown)


def tokens_read(texts, text, skip):
    """Where in the tokens `texts` the `text` lies that an interpreter was given: (first, end)."""
    at, ends = "".join(texts).find(text, sum(map(len, texts[:skip]))), np.cumsum(list(map(len, texts)))
    if at < 0:
        return skip, len(texts)
    return int(np.searchsorted(ends, at, "right")), int(np.searchsorted(ends, at + len(text))) + 1


def roles(run):
    """What the contexts served for [F, K] (0: nothing), which tokens were read of each [F, K, 2], and
    {(f, k): simulated activations [T], in 255ths of the range that they have over the feature's contexts}."""
    rows_FK, skip = run.samples.rows.numpy(), run.samples.config.get("skip_positions", 0)
    length, simulated = run.tokens_CT.shape[1], {}
    role_FK, read_FK2 = np.zeros(rows_FK.shape, "u1"), np.full((*rows_FK.shape, 2), (skip, length), "<u2")
    for f, dim in enumerate(run.samples.features.tolist()):
        document = run.journal.get(dim, {})
        scored = document.get("scored") or []
        values = document.get("simulated") or [[]] * len(scored)
        low, high = (limit((value for part in values for value in part), default=0) for limit in (min, max))
        served = [(SHOWN, context, None) for context in document.get("shown") or ()]
        served += [(SCORED, *each) for each in zip(scored, values, strict=True)]
        for role, context, simulation in served:
            for k in np.flatnonzero(rows_FK[f] == context["row"])[:1]:
                texts = [run.texts[token] for token in run.tokens_CT[run.context_FK[f, k]]]
                first, end = read_FK2[f, k] = tokens_read(texts, context["text"], skip)
                role_FK[f, k] = role
                if simulation and len(simulation) == end - first:
                    role_FK[f, k], simulated[f, k] = SIMULATED, np.zeros(length, "u1")
                    simulated[f, k][first:end] = (np.array(simulation) - low) * (255 / max(high - low, 1e-12))
    return role_FK, read_FK2, simulated


def pack(run, role_FK, read_FK2, simulated, contexts):
    """The contexts as base64 of gzip, and the sizes that page.js needs to unpack them.

    Inside, one after the other, little-endian: uint32 [F + 1] where the pairs of each feature begin, uint32
    [N] context, uint32 [C, T] token, uint16 [N, 2] tokens read, uint8 [N] kind, uint8 [N] role, uint8 [N, T]
    activation in 255ths of the feature's maximum (what fires is at least 1), uint8 [S, T] simulated.
    """
    kind_FK, acts_FKT = run.samples.kind.numpy(), run.samples.activations.numpy()
    chosen_FK = np.zeros(kind_FK.shape, bool)
    chosen_FK[:, columns_shown(kind_FK[0], contexts)] = True
    for role in (SHOWN, SCORED, SIMULATED):
        chosen_FK |= (role_FK == role) & ((role_FK == role).cumsum(1) <= 2 * contexts)
    chosen_FK &= run.context_FK >= 0
    f_N, k_N = np.nonzero(chosen_FK)
    used_C, place_N = np.unique(run.context_FK[f_N, k_N], return_inverse=True)
    scale_F = 255 / np.maximum(run.samples.max_activation.numpy(), 1e-12)
    scaled_NT = acts_FKT[f_N, k_N].astype("float32") * scale_F[f_N, None]
    parts = [
        np.append(0, chosen_FK.sum(1).cumsum()).astype("<u4"), place_N.astype("<u4"),
        run.tokens_CT[used_C].astype("<u4"), read_FK2[f_N, k_N], kind_FK[f_N, k_N].astype("u1"),
        role_FK[f_N, k_N], np.where(scaled_NT > 0, scaled_NT.round().clip(1, 255), 0).astype("u1"),
        *(simulated[pair] for pair in zip(f_N, k_N, strict=True) if pair in simulated),
    ]  # fmt: skip
    packed = gzip.compress(b"".join(part.tobytes() for part in parts), 6, mtime=0)
    sizes = {"pairs": len(f_N), "distinct": len(used_C), "length": acts_FKT.shape[2]}
    return base64.b64encode(packed).decode(), sizes


def content(run):
    """What page.js reads about a run, but for its contexts."""
    samples, skip, features = run.samples, run.samples.config.get("skip_positions", 0), []
    for f, dim in enumerate(samples.features.tolist()):
        kept = run.context_FK[f] >= 0
        acts_KT = samples.activations[f].numpy()[kept, skip:]
        tokens = top_tokens(run.tokens_CT[run.context_FK[f][kept], skip:], acts_KT)
        share, peak = 10 ** samples.log10_frequency[dim].item(), samples.max_activation[f].item()
        document = {key: value for key, value in run.journal.get(dim, {}).items() if key not in LEFT_OUT}
        features.append((dim, float(f"{share:.4g}"), float(f"{peak:.4g}"), tokens, run.effects[f], document))
    frequency = samples.log10_frequency.numpy()
    alive = frequency[np.isfinite(frequency)]
    counts, edges = np.histogram(alive, bins=60, range=(np.floor(alive.min(initial=-1.0)), 0.0))
    facts = {"autoencoder": samples.autoencoder_fingerprint, "dataset": samples.dataset_fingerprint}
    return {
        "config": samples.config, "metrics": run.metrics, "features": features, "near": run.near,
        "tokens": run.texts, "seen": samples.num_tokens_seen, "dead": len(frequency) - len(alive),
        "counts": counts.tolist(), "lowest": float(edges[0]), "fingerprints": facts,
    }  # fmt: skip


def render(runs, contexts, most_bytes=MOST_BYTES):
    """The page, as text; `contexts`: shown of each kind, fewer where the page would pass `most_bytes`."""
    from markupsafe import Markup

    served, data = [roles(run) for run in runs], [content(run) for run in runs]
    while True:
        packed = [pack(run, *parts, contexts) for run, parts in zip(runs, served, strict=True)]
        text = as_data([about | sizes for about, (_, sizes) in zip(data, packed, strict=True)])
        if contexts == 1 or len(text) + sum(len(contents) for contents, _ in packed) <= most_bytes:
            break
        contexts = contexts * 3 // 4
    script, style = (Path(__file__).with_name(name).read_text() for name in ("page.js", "page.css"))
    # The content security policy lets the page's own script run and nothing else.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    how = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True, "autoescape": True}
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), **how)
    return templates.get_template("page.html.jinja").render(
        config=runs[0].samples.config, data=text, packs=[contents for contents, _ in packed],
        script=Markup(script), style=Markup(style), digest=digest,
    )  # fmt: skip


def open_run(samples_path, dataset_path, explanations, autoencoder_path, metrics_path):
    """The Run of a samples file and what belongs to it. InputError for what was made from something else."""
    from sae.artifacts import check_origin, fingerprint, read_metrics
    from sae.autoencoder import load_checkpoint
    from sae.explanations import read_journal, token_texts
    from sae.samples import load_samples, nearest
    from sae.tokens import load_tokenizer, open_dataset, read_contexts

    for what, path in (("explanations", explanations), ("metrics", metrics_path)):
        if path and not Path(path).is_file():
            raise InputError(f"{what} needed at {path}, no such file")
    samples, (dataset, info) = load_samples(samples_path), open_dataset(dataset_path)
    what = f"the samples file {samples_path}"
    check_origin(what, samples.dataset_fingerprint, info["fingerprint"], dataset_path)
    near, metrics, made_with = None, {}, samples.config.get("autoencoder_path", "")
    if not autoencoder_path and Path(made_with).is_file():
        autoencoder_path = made_with if fingerprint(made_with) == samples.autoencoder_fingerprint else None
    if autoencoder_path:
        checkpoint = load_checkpoint(autoencoder_path)
        check_origin(what, samples.autoencoder_fingerprint, checkpoint.fingerprint, autoencoder_path)
        cosines_FN, others_FN = nearest(checkpoint.autoencoder.W_dec, samples.features, NEAR)
        cosines = cosines_FN.double().numpy().round(3).tolist()
        near = [list(zip(*row, strict=True)) for row in zip(others_FN.tolist(), cosines, strict=True)]
        metrics_path = metrics_path or Path(autoencoder_path).parent / "metrics.jsonl"
    if metrics_path:
        metrics = read_metrics(metrics_path, samples.config.get("trained_batches"))
    explanations = explanations or Path(samples_path).with_suffix(".explanations.jsonl")
    journal, _ = read_journal(explanations)
    for made_from in {document.get("samples_fingerprint") for document in journal.values()}:
        check_origin(f"the journal {explanations}", made_from, fingerprint(samples_path), samples_path)

    rows_FK, length = samples.rows.numpy(), samples.activations.shape[2]
    rows_C = np.unique(rows_FK[rows_FK >= 0])
    context_FK = np.where(rows_FK >= 0, np.searchsorted(rows_C, rows_FK), -1)
    ids_CT = np.concatenate([ids.numpy() for ids in read_contexts(dataset, rows_C, 1024, length)])
    moved = (samples.promoted, samples.promoted_logits), (samples.suppressed, samples.suppressed_logits)
    # Samples of version 0.1, and of models whose way to the logits is not known, have no such tokens.
    moved = [(ids_FL.numpy(), logits_FL.tolist()) for ids_FL, logits_FL in moved if ids_FL is not None]
    ids = np.unique(np.concatenate([ids_CT.ravel(), *(ids_FL.ravel() for ids_FL, _ in moved)]))
    moved = [(np.searchsorted(ids, ids_FL).tolist(), logits_FL) for ids_FL, logits_FL in moved]
    effects = [[list(zip(*pair, strict=True)) for pair in zip(*part, strict=True)] for part in moved]
    effects = list(zip(*effects, strict=True)) or [()] * len(rows_FK)
    texts = token_texts(load_tokenizer(dataset_path, info), ids.tolist())
    return Run(samples, journal, near, metrics, context_FK, np.searchsorted(ids, ids_CT), texts, effects)


def build(samples, dataset_path, explanations=None, autoencoder_path=None, metrics=None, contexts=12):
    """The page of the files `samples`; what belongs to each, in order, is found where it is not given."""
    found = {"explanations": explanations, "autoencoder_path": autoencoder_path, "metrics": metrics}
    for flag, given in found.items():
        if given and len(given) != len(samples):
            raise InputError(f"--{flag} of each samples file needed, {len(samples)}, got {len(given)}")
    belonging = zip(samples, *(given or [None] * len(samples) for given in found.values()), strict=True)
    return render([open_run(path, dataset_path, *others) for path, *others in belonging], contexts)
