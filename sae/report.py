"""The feature browser: everything there is to see about a run, in one HTML file that needs nothing else.

    python -m sae.report samples.pt --dataset_path tokens --autoencoder_path runs/layer10/50000.pt --out report.html

Dims: F features of the samples, K contexts kept of each, T tokens of a context, R distinct contexts, D, N as
elsewhere.
"""

import base64
import gzip
import json
from pathlib import Path

from sae import InputError, cli

KINDS = ("top", "spread", "random")  # by number, as in sae.samples
MOST_BYTES = 29_000_000
TOP_TOKENS, NEIGHBOURS, BINS = 10, 6, 60


def top_tokens(ids_KT, acts_KT, count=TOP_TOKENS):
    """What a feature fires on most: [(token id, share of its activation, times it fired, times seen)]."""
    import numpy as np

    tokens, where = np.unique(ids_KT, return_inverse=True)
    where, acts = where.ravel(), acts_KT.ravel().astype("float64")
    strength = np.bincount(where, acts)
    fired, seen = np.bincount(where, acts > 0), np.bincount(where)
    best = [i for i in np.argsort(-strength, kind="stable")[:count] if strength[i] > 0]
    return [
        (int(tokens[i]), round(strength[i] / strength.sum(), 4), int(fired[i]), int(seen[i])) for i in best
    ]


def nearest(W_dec_ND, features, count=NEIGHBOURS):
    """The features with the closest decoder rows: for each of `features` [(feature, cosine)], itself left out."""
    import torch

    unit_ND = torch.nn.functional.normalize(W_dec_ND, dim=1)
    found = []
    for some_F in features.split(512):
        cosine_FN = unit_ND[some_F] @ unit_ND.T
        cosine_FN[torch.arange(len(some_F)), some_F] = -2.0
        values, others = cosine_FN.topk(min(count, len(unit_ND) - 1))
        for row in zip(others.tolist(), values.tolist(), strict=True):
            found.append([(other, round(value, 3)) for other, value in zip(*row, strict=True)])
    return found


def histogram(log10_frequency, band):
    """The chart as percentages of its box: bars (x, width, height, label), the band (x, width), ticks (x, label)."""
    import numpy as np

    alive = log10_frequency[np.isfinite(log10_frequency)]
    low = float(np.floor(min(alive.min(initial=0.0), -1.0)))
    counts, edges = np.histogram(alive, bins=BINS, range=(low, 0.0))

    def place(value):
        return round(100 * (min(max(value, low), 0.0) - low) / -low, 3)

    bars = [
        (
            place(left),
            100 / BINS,
            100 * int(n) / max(1, counts.max()),
            f"{n} features fire on {10**left:.2%} or more",
        )
        for n, left in zip(counts, edges, strict=False)
    ]
    ticks = [(place(power), f"{100 * 10.0**power:g}%") for power in range(int(low), 1)]
    shade = None if band is None else (place(band[0]), place(band[1]) - place(band[0]))
    return {"bars": bars, "band": shade, "ticks": ticks}


def columns_shown(kind_K, contexts):
    """Which of the K columns to show: up to `contexts` of each kind; of the spread ones evenly chosen."""
    import numpy as np

    shown = []
    for kind in range(len(KINDS)):
        there = np.flatnonzero(kind_K == kind)
        steps = np.linspace(0, len(there) - 1, min(contexts, len(there))).round().astype(int)
        shown.append(there[steps] if kind == 1 else there[:contexts])
    return np.concatenate(shown)


def pack(rows_FK, acts_FKT, max_F, ids_RT, unique_R, shown):
    """The shown contexts as base64 of gzip, and the number of distinct ones.

    Inside, one after the other, little-endian: uint32 [F, K] context (-1: none), uint32 [R, T] token, uint8
    [F, K, T] activation as 255ths of the feature's maximum (what fires is at least 1).
    """
    import numpy as np

    rows_FK = rows_FK[:, shown]
    used_R = np.unique(rows_FK[rows_FK >= 0])
    context_FK = np.where(rows_FK >= 0, np.searchsorted(used_R, rows_FK), 2**32 - 1).astype("<u4")
    acts_FKT = acts_FKT[:, shown].astype("float32") / np.maximum(max_F, 1e-12)[:, None, None]
    bytes_FKT = np.where(acts_FKT > 0, (acts_FKT * 255).round().clip(1, 255), 0).astype("u1")
    tokens_RT = ids_RT[np.searchsorted(unique_R, used_R)].astype("<u4")
    raw = context_FK.tobytes() + tokens_RT.tobytes() + bytes_FKT.tobytes()
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode(), len(used_R)


def as_data(content):
    """JSON that no text in it can end or leave: safe inside <script type="application/json">."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def explanation(document):
    """What the page shows of a document of the journal."""
    keys = ("interpretation", "score", "score_reason", "interval", "control", "control_dim", "examples")
    return {key: document.get(key) for key in (*keys, "interpretation_model", "simulation")}


def render(samples, ids_RT, unique_R, texts, journal, neighbours, metrics, contexts):
    """The page. texts: {token id: text}; journal: {feature: document}; neighbours: as `nearest`, or None."""
    import hashlib

    import jinja2
    import numpy as np

    config, skip = samples.config, samples.config.get("skip_positions", 0)
    rows_FK, acts_FKT = samples.rows.numpy(), samples.activations.numpy()
    table = {id: place for place, id in enumerate(sorted(texts))}
    features = []
    for index, (dim, maximum) in enumerate(
        zip(samples.features.tolist(), samples.max_activation.tolist(), strict=True)
    ):
        kept = rows_FK[index] >= 0
        ids_KT = ids_RT[np.searchsorted(unique_R, rows_FK[index][kept])][:, skip:]
        top = top_tokens(ids_KT, acts_FKT[index][kept][:, skip:])
        share = 10 ** float(samples.log10_frequency[dim])
        tokens = [(table[id], *rest) for id, *rest in top]
        features.append([dim, float(f"{share:.4g}"), float(f"{maximum:.4g}"), tokens])

    data = {
        "features": features,
        "near": neighbours,
        "explained": {dim: explanation(journal[dim]) for dim in samples.features.tolist() if dim in journal},
        "tokens": [texts[id] for id in sorted(texts)],
        "length": acts_FKT.shape[2],
        "skip": skip,
    }
    place_of = np.array(sorted(texts))
    while True:
        shown = columns_shown(samples.kind[0].numpy(), contexts)
        packed, distinct = pack(
            rows_FK,
            acts_FKT,
            samples.max_activation.numpy(),
            np.searchsorted(place_of, ids_RT),
            unique_R,
            shown,
        )
        data |= {"distinct": distinct, "kinds": samples.kind[0].numpy()[shown].tolist()}
        text = as_data(data)
        if len(text) + len(packed) <= MOST_BYTES or contexts == 1:
            break
        contexts = max(1, contexts * 3 // 4)

    frequency = samples.log10_frequency.numpy()
    lower, upper = config.get("log_freq_lower"), config.get("log_freq_upper")
    band = None if lower is None or upper is None else (lower, upper)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["csp"] = lambda script: base64.b64encode(
        hashlib.sha256(script.encode()).digest()
    ).decode()
    return environment.get_template("report.html.jinja").render(
        config=config, metrics=metrics, chart=histogram(frequency, band), band=band, data=jinja2.filters.Markup(text),
        packed=packed, count=len(features), explained=len(data["explained"]), tokens_seen=samples.num_tokens_seen,
        dead=int((~np.isfinite(frequency)).sum()), model=Path(config["model_name"]).name, autoencoder=samples.autoencoder_fingerprint, dataset=samples.dataset_fingerprint,
    )  # fmt: skip


def build(
    samples_path, dataset_path, explanations=None, autoencoder_path=None, metrics_path=None, contexts=12
):
    """The page for a samples file and what belongs to it; refuses what was made from something else."""
    import numpy as np

    from sae.artifacts import check_origin, fingerprint
    from sae.autoencoder import load_checkpoint
    from sae.export import read_metrics
    from sae.journal import read_journal
    from sae.models import load_tokenizer
    from sae.prompts import token_texts
    from sae.samples import load_samples
    from sae.tokens import open_dataset, read_contexts

    samples = load_samples(samples_path)
    dataset, info = open_dataset(dataset_path)
    check_origin(
        f"the samples file {samples_path}", samples.dataset_fingerprint, info["fingerprint"], dataset_path
    )
    beside = Path(samples_path).with_suffix(".explanations.jsonl")
    if explanations and not Path(explanations).is_file():
        raise InputError(f"explanations needed at {explanations}, no such file")
    journal, _ = read_journal(explanations or beside)
    for document in list(journal.values())[:1]:
        made_from, given = document.get("samples_fingerprint"), fingerprint(samples_path)
        if made_from is not None:
            check_origin(f"the journal {explanations or beside}", made_from, given, samples_path)
    neighbours, metrics = None, {}
    if autoencoder_path:
        checkpoint = load_checkpoint(autoencoder_path)
        made_from, given = samples.autoencoder_fingerprint, checkpoint.fingerprint
        check_origin(f"the samples file {samples_path}", made_from, given, autoencoder_path)
        neighbours = nearest(checkpoint.autoencoder.W_dec, samples.features)
        metrics_path = metrics_path or Path(autoencoder_path).parent / "metrics.jsonl"
    if metrics_path:
        metrics = read_metrics(metrics_path, samples.config.get("trained_batches"))

    unique_R = np.unique(samples.rows[samples.rows >= 0].numpy())
    length = samples.activations.shape[2]
    ids_RT = np.concatenate([ids.numpy() for ids in read_contexts(dataset, unique_R, 1024, length)])
    used = np.unique(ids_RT).tolist()
    texts = dict(zip(used, token_texts(load_tokenizer(info["tokenizer_name"]), used), strict=True))
    return render(samples, ids_RT, unique_R, texts, journal, neighbours, metrics, contexts), len(
        samples.features
    )


def parse_args():
    parser = cli.Parser(__doc__)
    parser.prog = "python -m sae.report"
    add = parser.add_argument
    add("samples", help="interpretation samples (.pt)")
    add(
        "--dataset_path",
        default="./tokenized_dataset",
        help="tokenised dataset that the samples were taken from",
    )
    add(
        "--explanations",
        help="journal of explanations; default: <samples stem>.explanations.jsonl, where it is",
    )
    add("--autoencoder_path", help="checkpoint that the samples were taken with: for the nearest features")
    add("--metrics", help="metrics.jsonl of the training run; default: the one beside the checkpoint")
    add(
        "--contexts",
        type=cli.whole_number(1),
        default=12,
        help="shown of each kind; fewer where 30 MB would not do",
    )
    add("--out", default="report.html", help="HTML file to write")
    return parser, parser.parse_args()


def main(args):
    from sae.artifacts import atomic_write

    page, features = build(
        args.samples, args.dataset_path, args.explanations, args.autoencoder_path, args.metrics, args.contexts
    )
    with atomic_write(args.out) as handle:
        size = handle.write(page.encode())
    print(f"{args.out}: {features} features, {size / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    PARSER, ARGS = parse_args()
    with PARSER.friendly_errors():
        main(ARGS)
