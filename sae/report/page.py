"""The feature browser: everything there is to see about a run, in one HTML file that needs nothing else.

    python -m sae.report samples.pt --dataset_path tokens --autoencoder_path runs/layer10/50000.pt

Dims: F features of the samples, K contexts kept of each, T tokens of a context, C distinct contexts.
"""

import base64
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np

from sae import InputError

TOP, SPREAD, RANDOM = 0, 1, 2  # as in sae.samples, which would import torch
MOST_BYTES = 29_000_000
NONE = 2**32 - 1
EXPLANATION = ("interpretation", "score", "score_reason", "interval", "control", "control_dim", "examples")


def top_tokens(ids_KT, acts_KT, count=10):
    """What a feature fires on most: [(token id, share of its activation, times it fired, times seen)]."""
    tokens, where = np.unique(ids_KT, return_inverse=True)
    where, acts = where.ravel(), acts_KT.ravel().astype("float64")
    strength, total = np.bincount(where, acts), max(acts.sum(), 1e-12)
    fired, seen = np.bincount(where, acts > 0), np.bincount(where)
    best = [i for i in np.argsort(-strength, kind="stable")[:count] if strength[i] > 0]
    return [(int(tokens[i]), round(strength[i] / total, 4), int(fired[i]), int(seen[i])) for i in best]


def nearest(W_dec, features, count=6):
    """For each of `features` the closest rows of W_dec [dict, act] but its own: [(feature, cosine)]."""
    import torch

    unit = torch.nn.functional.normalize(W_dec, dim=1)
    found = []
    for some in features.split(512):
        cosine = unit[some] @ unit.T
        cosine[torch.arange(len(some)), some] = -2.0
        values, others = cosine.topk(min(count, len(unit) - 1))
        for row in zip(others.tolist(), values.tolist(), strict=True):
            found.append([(other, round(value, 3)) for other, value in zip(*row, strict=True)])
    return found


def histogram(log10_frequency, band, bins=60):
    """A chart in percent of its box: bars (x, width, height, label), band (x, width), ticks (x, label)."""
    alive = log10_frequency[np.isfinite(log10_frequency)]
    low = float(np.floor(alive.min(initial=-1.0)))
    counts, edges = np.histogram(alive, bins=bins, range=(low, 0.0))

    def place(value):
        return round(100 * (min(max(value, low), 0.0) - low) / -low, 3)

    bars = [
        (
            place(edge),
            100 / bins,
            100 * int(n) / max(1, counts.max()),
            f"{n} features, from {10**edge:.2%} on",
        )
        for n, edge in zip(counts, edges[:-1], strict=True)
    ]
    ticks = [(place(power), f"{100 * 10.0**power:g}%") for power in range(int(low), 1)]
    return {"bars": bars, "ticks": ticks, "band": band and (place(band[0]), place(band[1]) - place(band[0]))}


def columns_shown(kind_K, most):
    """Which of the K columns to show: up to `most` of each kind, of the spread ones at even steps."""
    shown = []
    for kind in (TOP, SPREAD, RANDOM):
        there = np.flatnonzero(kind_K == kind)
        steps = np.linspace(0, len(there) - 1, min(most, len(there))).round().astype(int)
        shown.append(there[steps] if kind == SPREAD else there[:most])
    return np.concatenate(shown)


def pack(context_FK, acts_FKT, max_F, tokens_CT):
    """The contexts as base64 of gzip, and how many distinct ones: all that `page.html.jinja` unpacks.

    Inside, one after the other, little-endian: uint32 [F, K] context (NONE: missing), uint32 [C, T] token,
    uint8 [F, K, T] activation in 255ths of the feature's maximum (what fires is at least 1).
    """
    used = np.unique(context_FK[context_FK >= 0])
    places_FK = np.where(context_FK >= 0, np.searchsorted(used, context_FK), NONE).astype("<u4")
    scaled_FKT = acts_FKT.astype("float32") * (255 / np.maximum(max_F, 1e-12))[:, None, None]
    bytes_FKT = np.where(scaled_FKT > 0, scaled_FKT.round().clip(1, 255), 0).astype("u1")
    raw = places_FK.tobytes() + tokens_CT[used].astype("<u4").tobytes() + bytes_FKT.tobytes()
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode(), len(used)


def as_data(content):
    """JSON that no text in it can end or leave: safe inside <script type="application/json">."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def render(samples, context_FK, tokens_CT, texts, journal, near, metrics, contexts, most_bytes=MOST_BYTES):
    """The page, as text.

    context_FK: index into tokens_CT, -1 for none; tokens_CT: index into `texts`; journal: {feature: its
    document}; near: as from `nearest`, or None; contexts: shown of each kind, fewer where the page would
    pass most_bytes.
    """
    import jinja2
    from markupsafe import Markup

    config, skip = samples.config, samples.config.get("skip_positions", 0)
    acts_FKT, kind_K = samples.activations.numpy(), samples.kind[0].numpy()
    features, max_F = samples.features.tolist(), samples.max_activation.numpy()
    rows = []
    for f, dim in enumerate(features):
        kept = context_FK[f] >= 0
        tokens = top_tokens(tokens_CT[context_FK[f][kept], skip:], acts_FKT[f, kept, skip:])
        share = 10 ** float(samples.log10_frequency[dim])
        rows.append((dim, float(f"{share:.4g}"), float(f"{max_F[f]:.4g}"), tokens))
    keys = (*EXPLANATION, "interpretation_model", "simulation")
    explained = {dim: {key: journal[dim].get(key) for key in keys} for dim in features if dim in journal}
    data = {"features": rows, "near": near, "explained": explained, "tokens": texts, "skip": skip}
    while True:
        shown = columns_shown(kind_K, contexts)
        packed, distinct = pack(context_FK[:, shown], acts_FKT[:, shown], max_F, tokens_CT)
        data |= {"distinct": distinct, "kinds": kind_K[shown].tolist(), "length": acts_FKT.shape[2]}
        text = as_data(data)
        if contexts == 1 or len(text) + len(packed) <= most_bytes:
            break
        contexts = contexts * 3 // 4

    frequency = samples.log10_frequency.numpy()
    band = (config["log_freq_lower"], config["log_freq_upper"]) if "log_freq_lower" in config else None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # The content security policy lets the page's own script run and nothing else.
    environment.filters["csp"] = lambda text: base64.b64encode(
        hashlib.sha256(text.encode()).digest()
    ).decode()
    return environment.get_template("page.html.jinja").render(
        samples=samples, config=config, model=Path(config["model_name"]).name, metrics=metrics, band=band,
        chart=histogram(frequency, band), dead=int((~np.isfinite(frequency)).sum()), count=len(features),
        explained=len(explained), data=Markup(text), packed=packed,
    )  # fmt: skip


def build(
    samples_path, dataset_path, explanations=None, autoencoder_path=None, metrics_path=None, contexts=12
):
    """The page of a samples file and what belongs to it. InputError for what was made from something else."""
    from sae.artifacts import check_origin, fingerprint
    from sae.autoencoder import load_checkpoint
    from sae.explanations import read_journal, token_texts
    from sae.export import read_metrics
    from sae.samples import load_samples
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
        near = nearest(checkpoint.autoencoder.W_dec, samples.features)
        metrics_path = metrics_path or Path(autoencoder_path).parent / "metrics.jsonl"
    if metrics_path:
        metrics = read_metrics(metrics_path, samples.config.get("trained_batches"))
    explanations = explanations or Path(samples_path).with_suffix(".explanations.jsonl")
    journal, _ = read_journal(explanations, mend=False)
    for made_from in {document.get("samples_fingerprint") for document in journal.values()}:
        check_origin(f"the journal {explanations}", made_from, fingerprint(samples_path), samples_path)

    rows_FK = samples.rows.numpy()
    rows_C = np.unique(rows_FK[rows_FK >= 0])
    context_FK = np.where(rows_FK >= 0, np.searchsorted(rows_C, rows_FK), -1)
    length = samples.activations.shape[2]
    ids_CT = np.concatenate([ids.numpy() for ids in read_contexts(dataset, rows_C, 1024, length)])
    ids, tokens_CT = np.unique(ids_CT, return_inverse=True)
    texts = token_texts(load_tokenizer(dataset_path, info), ids.tolist())
    tokens_CT = tokens_CT.reshape(ids_CT.shape)
    return render(samples, context_FK, tokens_CT, texts, journal, near, metrics, contexts)
