"""The features of a run for Neuronpedia: files as SAEDashboard's Neuronpedia runner writes and reads them.

What would take another pass over the LLM (alignment with neurons, correlations, all logits) is empty.
Dims: K contexts kept of a feature, T tokens of a context, A activations above 0.
"""

import gzip
import hashlib
import json

import numpy as np

from sae.report.page import RANDOM, SPREAD, TOP

FEATURES, INTERVALS = 128, 5  # of a file, of a feature's range: as many as SAEDashboard's
EMPTY = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "vector",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
)  # fmt: skip
SCORES = {"score": "simulation", "detection": "eleuther_recall", "fuzzing": "eleuther_fuzz"}  # their names


def bins(kind_K, acts_KT):
    """bin_min, bin_max and bin_contains of each context, by the rules that SAEDashboard has for its groups.

    A spread context lies in one of five equal parts of the range, which contains that share of what fires in
    random contexts.
    """
    top, drawn_A = acts_KT.max(initial=0.0), acts_KT[kind_K == RANDOM]
    edges, drawn_A = np.linspace(0, top, INTERVALS + 1), drawn_A[drawn_A > 0]
    shares = np.histogram(drawn_A, edges)[0] / max(1, len(drawn_A))
    part_K = (np.searchsorted(edges, acts_KT.max(1, initial=0.0)) - 1).clip(0, INTERVALS - 1)
    found = [
        {TOP: (-1, top, -1), RANDOM: (0, 0, 0), SPREAD: (edges[part], edges[part + 1], shares[part])}[kind]
        for kind, part in zip(kind_K.tolist(), part_K, strict=True)
    ]
    return np.round(np.array(found, "float64").reshape(-1, 3), 4).tolist()


def dashboard(run, f):
    """The feature at place `f` of the samples: the content of a NeuronpediaDashboardFeature."""
    samples, kept_K = run.samples, run.context_FK[f] >= 0
    dim, acts_KT = int(samples.features[f]), samples.activations[f].double().numpy()[kept_K]
    tokens_KT = run.tokens_CT[run.context_FK[f][kept_K]]
    fired = acts_KT[acts_KT > 0]
    heights, edges = np.histogram(fired, bins=50) if len(fired) else (np.zeros(0), np.zeros(1))
    up, down = run.effects[f] or ([], [])
    groups = zip(bins(samples.kind[f].numpy()[kept_K], acts_KT), tokens_KT, acts_KT, strict=True)
    activations = [
        {
            "bin_min": low, "bin_max": high, "bin_contains": share,
            "values": acts_T.round(3).tolist(), "tokens": [run.texts[token] for token in tokens_T],
            "qualifying_token_index": int(acts_T.argmax()),
        }
        for (low, high, share), tokens_T, acts_T in groups
    ]  # fmt: skip
    return {key: [] for key in EMPTY} | {
        "feature_index": dim, "frac_nonzero": 10 ** samples.log10_frequency[dim].item(),
        "pos_str": [run.texts[token] for token, _ in up], "pos_values": [round(value, 3) for _, value in up],
        "neg_str": [run.texts[at] for at, _ in down], "neg_values": [round(value, 3) for _, value in down],
        "freq_hist_data_bar_heights": heights.astype(int).tolist(),
        "freq_hist_data_bar_values": ((edges[:-1] + edges[1:]) / 2).round(3).tolist(),
        **size(run), "dataset": samples.config.get("dataset_name", ""), "activations": activations,
    }  # fmt: skip


def size(run):
    length = run.tokens_CT.shape[1]
    return {"n_prompts_total": run.samples.num_tokens_seen // length, "n_tokens_in_prompt": length}


def explanation(document, model, source):
    """A row of Neuronpedia's table of explanations, with its scores."""
    text, dim, by = document["interpretation"], document["dim"], document.get("interpretation_model", "")
    id = hashlib.sha256(f"{model} {source} {dim} {text}".encode()).hexdigest()[:25]
    scores = [
        {"explanationId": id, "explanationScoreTypeName": name, "value": document[key]}
        for key, name in SCORES.items() if document.get(key) is not None
    ]  # fmt: skip
    return {
        "id": id, "modelId": model, "layer": source, "index": str(dim), "description": text,
        "explanationModelName": by, "typeName": document.get("explained_by", "lines"), "scores": scores,
    }  # fmt: skip


def write(folder, run, model):
    """Fill `folder`; `model`: Neuronpedia's name of the LLM."""
    config, features = run.samples.config, run.samples.features.tolist()
    name = f"{config['layer_type']}-{config['dict_vec_size']}"
    about = {"model_id": model, "layer": config["layer_id"], "sae_set": name}
    source = f"{config['layer_id']}-{name}"
    (folder / "explanations").mkdir()
    for number, first in enumerate(range(0, len(features), FEATURES)):
        dims = features[first : first + FEATURES]
        batch = {"sae_id_suffix": None, "features": [dashboard(run, first + i) for i in range(len(dims))]}
        (folder / f"batch-{number}.json").write_text(json.dumps(about | batch))
        found = [explanation(run.journal[dim], model, source) for dim in dims if dim in run.journal]
        lines = gzip.compress("".join(json.dumps(row) + "\n" for row in found).encode(), mtime=0)
        (folder / "explanations" / f"batch-{number}.jsonl.gz").write_bytes(lines)
    settings = about | size(run) | {"sae_path": config.get("autoencoder_path", ""), "outputs_dir": "."}
    (folder / "run_settings.json").write_text(json.dumps(settings | {"n_features_at_a_time": FEATURES}))
    skipped = sorted(set(range(config["dict_vec_size"])) - set(features))
    (folder / "skipped_indexes.json").write_text(json.dumps(about | {"skipped_indexes": skipped}))
