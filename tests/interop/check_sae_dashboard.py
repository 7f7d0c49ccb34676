"""`make interop-dashboard`: the neuronpedia folder in the real sae-dashboard package (a venv of its own).

Its NeuronpediaDashboardBatch reads every file and writes the same content back, its runner's settings take
ours, and what its converter makes of the same activations and logits is what we wrote.
"""

import json
import os
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent.parent
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch  # noqa: E402
from sae_dashboard.components import (  # noqa: E402
    ActsHistogramData,
    LogitsTableData,
    SequenceData,
    SequenceGroupData,
    SequenceMultiGroupData,
)
from sae_dashboard.feature_data import FeatureData  # noqa: E402
from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter  # noqa: E402
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch  # noqa: E402
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig  # noqa: E402

MAKE = """
import sys
sys.path[:0] = ["tests", "tests/report"]
from pathlib import Path
from test_export import write_explained_run
write_explained_run(Path(sys.argv[1]), "inputs/smollm2", "inputs/stdlib")
"""


def theirs(feature, settings, words):
    """What SAEDashboard's own converter makes of a feature's activations and logits."""
    ids = {word: id for id, word in enumerate(words)}
    acts = torch.tensor([value for context in feature["activations"] for value in context["values"]])
    share = feature["frac_nonzero"]
    histogram = ActsHistogramData.from_data(
        acts[acts > 0], 50, "5 ticks", f"ACTIVATIONS<br>DENSITY = {share:.6%}"
    )
    groups = {}
    for context in feature["activations"]:
        low, high, contains = (context[f"bin_{part}"] for part in ("min", "max", "contains"))
        title = "RANDOM"
        if low == -1:
            title = f"TOP ACTIVATIONS<br>MAX = {high}"
        elif high:
            title = f"INTERVAL {low} - {high}<br>CONTAINS {100 * contains:.2f}%"
        sequence = SequenceData(
            token_ids=[ids[token] for token in context["tokens"]], feat_acts=context["values"],
            # It gives the index one less than it was asked for: it counts a token at the beginning.
            qualifying_token_index=context["qualifying_token_index"] + 1,
        )  # fmt: skip
        groups.setdefault(title, []).append(sequence)
    table = LogitsTableData(
        bottom_token_ids=[ids[token] for token in feature["neg_str"]], bottom_logits=feature["neg_values"],
        top_token_ids=[ids[token] for token in feature["pos_str"]], top_logits=feature["pos_values"],
    )  # fmt: skip
    sequences = SequenceMultiGroupData([SequenceGroupData(title, some) for title, some in groups.items()])
    data = FeatureData(acts_histogram_data=histogram, logits_table_data=table, sequence_data=sequences)
    data.dfa_data = None
    model = SimpleNamespace(cfg=SimpleNamespace(d_vocab=len(words)))
    text = NeuronpediaConverter.convert_to_np_json(
        model,
        SimpleNamespace(feature_data_dict={feature["feature_index"]: data}),
        settings,
        dict(enumerate(words)),
    )
    return json.loads(text)


def main():
    with tempfile.TemporaryDirectory() as name:
        folder, python = Path(name), str(ROOT / ".venv" / "bin" / "python")
        subprocess.run([python, "-c", MAKE, name], cwd=ROOT, check=True)
        command = [
            python,
            "-m",
            "sae.export",
            str(folder / "7.pt"),
            str(folder / "out"),
            "--format",
            "neuronpedia",
        ]
        flags = ["--samples", str(folder / "samples.pt"), "--dataset_path", str(folder / "tokens")]
        subprocess.run([*command, *flags], cwd=ROOT, check=True)
        settings = NeuronpediaRunnerConfig(**json.loads((folder / "out" / "run_settings.json").read_text()))
        files, features = sorted((folder / "out").glob("batch-*.json")), 0
        for file in files:
            ours = json.loads(file.read_text())
            assert NeuronpediaDashboardBatch(**ours).to_dict() == ours, file
            for feature in ours["features"]:
                if not feature["activations"]:  # a feature without contexts: nothing to compare
                    continue
                tokens = {token for context in feature["activations"] for token in context["tokens"]}
                words = sorted(tokens | set(feature["pos_str"]) | set(feature["neg_str"]))
                made = theirs(feature, settings, words)
                assert {key: made[key] for key in ("model_id", "layer", "sae_set")} == {
                    key: ours[key] for key in ("model_id", "layer", "sae_set")
                }
                (other,) = made["features"]
                assert other.keys() == feature.keys()
                for key, value in feature.items():
                    if key in ("activations", "dataset", "frac_nonzero", "freq_hist_data_bar_values"):
                        continue
                    assert other[key] == value, (feature["feature_index"], key, other[key], value)
                close = torch.testing.assert_close
                close(other["frac_nonzero"], feature["frac_nonzero"], rtol=0, atol=1e-7)
                bars = (other["freq_hist_data_bar_values"], feature["freq_hist_data_bar_values"])
                if sum(map(bool, feature["freq_hist_data_bar_heights"])) > 1:  # else it draws no width
                    close(*map(torch.tensor, bars), rtol=0, atol=2e-3)
                assert len(other["activations"]) == len(feature["activations"]) > 0
                for a, b in zip(other["activations"], feature["activations"], strict=True):
                    assert a["tokens"] == b["tokens"] and a["values"] == b["values"]
                    assert a["qualifying_token_index"] == b["qualifying_token_index"]
                    assert (a["bin_min"], a["bin_max"]) == (b["bin_min"], b["bin_max"])
                    close(float(a["bin_contains"]), float(b["bin_contains"]), rtol=0, atol=1e-4)
                features += 1
    print(f"sae-dashboard {version('sae-dashboard')}: {len(files)} files, {features} features, all equal")


if __name__ == "__main__":
    main()
