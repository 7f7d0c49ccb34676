"""sae.export: folders that other tools open, model cards, features for Neuronpedia."""

import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import assert_refused, run_module, write_dataset
from safetensors.torch import load_file

from sae import InputError
from sae.artifacts import fingerprint, load_pt, save_pt
from sae.autoencoder import Autoencoder, load_checkpoint, save_checkpoint
from sae.export import export as write
from sae.export import sae_lens_config
from sae.models import load_tokenizer
from sae.report import open_run, write_neuronpedia
from sae.report.neuronpedia import bins

METRICS = {"l0": 12.34, "explained_variance": 0.876, "loss_recovered": 0.91, "dead_share": 0.0625}


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint at batch 7 of a run that kept its metrics, with one dead feature of 16."""
    folder = tmp_path / "run"
    autoencoder = Autoencoder(8, 16, normalize=True, rng=torch.Generator().manual_seed(0)).requires_grad_(
        False
    )
    autoencoder.b_dec.copy_(torch.linspace(-1, 1, 8))
    config = {
        "act_vec_size": 8, "dict_vec_size": 16, "layer_id": 3, "layer_type": "mlp_activations",
        "hookpoint": "model.layers.3.mlp.act_fn", "model_name": "someone/some-llm", "normalize_dataset": True,
        "num_tokens": 32, "skip_positions": 2, "min_tokens": 64, "trained_batches": 7, "trained_tokens": 1792,
    }  # fmt: skip
    frequency = torch.full((16,), -2.0)
    frequency[5] = -torch.inf
    save_checkpoint(folder / "7.pt", config, autoencoder, frequency)
    lines = [
        {"event": "checkpoint", "batch": 6, **METRICS, "l0": 99.0},
        {"event": "log", "batch": 7, "l0": 98.0},
        {"event": "checkpoint", "batch": 7, **METRICS},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "7.pt"


def export(*args, **options):
    return run_module("sae.export", *args, **options)


def test_sae_lens_folder_gives_the_same_sums(checkpoint, tmp_path):
    # The real package is asked in tests/interop; here its formulas are written out from cfg.json's words.
    result = export(checkpoint, tmp_path / "out", "--format", "sae_lens")
    assert result.returncode == 0, result.stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "README.md",
    }  # fmt: skip
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == ("standard", 8, 16)
    assert cfg["apply_b_dec_to_input"] is True
    assert cfg["normalize_activations"] == "constant_norm_rescale"
    assert cfg["metadata"]["hook_name"] == "model.layers.3.mlp.act_fn"
    assert cfg["metadata"]["model_class_name"] == "AutoModelForCausalLM"
    assert cfg["metadata"]["model_name"] == "someone/some-llm"
    assert (cfg["metadata"]["seqpos_slice"], cfg["metadata"]["context_size"]) == ([2, 32], 64)
    w = load_file(tmp_path / "out" / "sae_weights.safetensors")
    x_ND = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)) * 5
    scale_N1 = 8**0.5 / x_ND.norm(dim=1, keepdim=True)
    f_NF = torch.relu((x_ND * scale_N1 - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    ours = load_checkpoint(checkpoint).autoencoder
    torch.testing.assert_close(ours.features(x_ND), f_NF)
    torch.testing.assert_close(ours(x_ND), (f_NF @ w["W_dec"] + w["b_dec"]) / scale_N1)
    sparsity = load_file(tmp_path / "out" / "sparsity.safetensors")["sparsity"]
    assert sparsity[5].item() == -10 and abs(sparsity[4].item() + 2) < 1e-6


def test_safetensors_folder_holds_the_checkpoint_as_it_is(checkpoint, tmp_path):
    result = export(checkpoint, tmp_path / "out", "--format", "safetensors", fresh=True)
    assert result.returncode == 0, result.stderr
    given = torch.load(checkpoint, weights_only=True)
    weights = load_file(tmp_path / "out" / "autoencoder.safetensors")
    assert weights.keys() == {*given["state_dict"], "log10_frequency"}
    for name, value in given["state_dict"].items():
        assert torch.equal(weights[name], value)
    assert torch.equal(weights["log10_frequency"], given["log10_frequency"])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == given["config"]


def test_card_is_written_from_the_checkpoints_own_metrics(checkpoint, tmp_path):
    from huggingface_hub import ModelCard

    write(checkpoint, tmp_path / "out", "sae_lens", "someone/other-llm")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "someone/other-llm" and card.data.library_name == "sae_lens"
    for shown in ("| 12.3 |", "| 0.876 |", "| 0.910 |", "| 6.2% |"):
        assert shown in card.text
    (checkpoint.parent / "metrics.jsonl").unlink()
    write(checkpoint, tmp_path / "without", "safetensors", "./local")
    card = ModelCard.load(tmp_path / "without" / "README.md")
    assert "No metrics" in card.text and card.data.library_name is card.data.base_model is None


def test_a_folder_is_on_disk_before_it_has_its_name(checkpoint, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("sae.artifacts.sync", lambda path: synced.append((path, (tmp_path / "out").exists())))
    write(checkpoint, tmp_path / "out", "safetensors")
    *before, after = synced
    assert after == (tmp_path, True) and not any(there for _, there in before)
    names = {"whole", "README.md", "autoencoder.safetensors", "config.json"}
    assert {path.name for path, _ in before} == names


def test_nothing_is_overwritten_and_no_part_is_left(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert_refused(export(checkpoint, tmp_path / "out"), "new or empty folder", tmp_path / "out")
    (tmp_path / "torn.pt").write_bytes(checkpoint.read_bytes()[:100])
    for path, came in ((tmp_path / "none.pt", "no such file"), (tmp_path / "torn.pt", "truncated")):
        with pytest.raises(InputError, match=f"{path.name}.*{came}"):
            write(path, tmp_path / "new", "sae_lens")
    with pytest.raises(InputError, match=r"out needs a folder .*torn.pt takes no files"):
        write(checkpoint, tmp_path / "torn.pt" / "new", "sae_lens")
    assert_refused(export(checkpoint, tmp_path / "new", "--format", "onnx"), "onnx", "sae_lens")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "run", "torn.pt"]


@pytest.mark.parametrize(
    ("architecture", "theirs"),
    [("relu", "standard"), ("topk", "topk"), ("batchtopk", "jumprelu"), ("jumprelu", "jumprelu")],
)
def test_sae_lens_knows_each_architecture_by_its_own_name(architecture, theirs):
    config = {
        "act_vec_size": 8,
        "dict_vec_size": 16,
        "model_name": "m",
        "hookpoint": "h",
        "k": 5,
        "num_tokens": 0,
    }
    cfg = sae_lens_config(config | {"architecture": architecture})
    assert cfg["architecture"] == theirs and cfg["metadata"]["seqpos_slice"] == [0, None]
    topk = {"k": 5, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    assert {key: cfg[key] for key in ("k", "rescale_acts_by_decoder_norm") if key in cfg} == topk


# --- Neuronpedia ---


def write_explained_run(folder, tokenizer, corpus):
    """A run of three features on real contexts, with promoted tokens and explanations, in `folder`."""
    from test_report import write_run

    ids, documents = [], []
    for number, file in enumerate(sorted(Path(corpus).glob("*.py"))[:6]):
        tokens = load_tokenizer(tokenizer)(file.read_text(), add_special_tokens=False)["input_ids"]
        ids.append(tokens[:32])
        documents.append(number)
    write_dataset(folder / "tokens", ids, documents, tokenizer)
    explanations = [
        {"dim": 7, "interpretation": "a word", "explained_by": "text", "score": 0.75, "detection": 0.5,
         "fuzzing": None, "interpretation_model": "some-llm"},
        {"dim": 12, "interpretation": "another", "score": None, "fuzzing": 0.25},
    ]  # fmt: skip
    fires = {
        7: {0: {3: 2.0, 5: 1.0}, 1: {4: 0.5}, 2: {6: 1.9, 7: 0.1}, 3: {}},
        12: {0: {9: 4.0}, 4: {}, 5: {}}, 30: {},
    }  # fmt: skip
    write_run(folder, folder / "tokens", tokenizer, fires, 32, explanations)
    samples = load_pt(folder / "samples.pt", "samples", ())
    for name, sign in (("promoted", 1), ("suppressed", -1)):
        samples[name] = torch.arange(30).view(3, 10) + 1000 * (sign + 2)
        samples[f"{name}_logits"] = sign * torch.linspace(3, 1, 30).view(3, 10)
    save_pt(folder / "samples.pt", samples)
    journal = folder / "samples.explanations.jsonl"
    with open(journal) as handle:
        lines = [
            json.loads(line) | {"samples_fingerprint": fingerprint(folder / "samples.pt")} for line in handle
        ]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_neuronpedia_folder_holds_what_the_samples_hold(tmp_path, smollm2, stdlib, monkeypatch):
    # The real package reads it in tests/interop; here its fields are checked against the samples.
    write_explained_run(tmp_path, smollm2, stdlib)
    flags = [
        "--samples",
        tmp_path / "samples.pt",
        "--dataset_path",
        tmp_path / "tokens",
        "--model_name",
        "llm",
    ]
    result = export(tmp_path / "7.pt", tmp_path / "out", "--format", "neuronpedia", *flags)
    assert result.returncode == 0, result.stderr
    batch = json.loads((tmp_path / "out" / "batch-0.json").read_text())
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("llm", 1, "mlp_activations-320")
    first, second, third = batch["features"]
    assert [part["values"][9] for part in second["activations"]] == [4.0, 0.0, 0.0]
    assert [feature["feature_index"] for feature in batch["features"]] == [7, 12, 30]
    assert abs(first["frac_nonzero"] - 10**-1.5) < 1e-6
    assert (first["n_prompts_total"], first["n_tokens_in_prompt"]) == (10_000 // 32, 32)
    # Five activations from 0.1 to 2.0, in 50 bins of 0.038.
    heights = first["freq_hist_data_bar_heights"]
    assert {bin: n for bin, n in enumerate(heights) if n} == {0: 1, 10: 1, 23: 1, 47: 1, 49: 1}
    assert first["freq_hist_data_bar_values"][::49] == [0.119, 1.981]
    top, spread, *drawn = first["activations"]
    assert (top["bin_min"], top["bin_max"], top["bin_contains"]) == (-1, 2.0, -1)
    # 0.5 of 2.0 lies in the second fifth; of the two tokens that fire in random contexts neither does.
    assert (spread["bin_min"], spread["bin_max"], spread["bin_contains"]) == (0.4, 0.8, 0)
    assert [(a["bin_min"], a["bin_max"], a["bin_contains"]) for a in drawn] == [(0, 0, 0)] * 2
    assert top["values"][3] == 2.0 and top["qualifying_token_index"] == 3 and sum(top["values"]) == 3.0
    tokens = load_tokenizer(smollm2)
    ids = datasets.load_from_disk(tmp_path / "tokens")[0]["input_ids"]
    assert "".join(top["tokens"]) == tokens.decode(ids)
    assert third["activations"] == [] and third["freq_hist_data_bar_heights"] == []
    if first["pos_str"]:  # samples that hold promoted tokens
        assert first["pos_str"][0] == tokens.decode([3000]) and first["pos_values"][0] == 3.0
        assert first["neg_str"][0] == tokens.decode([1000]) and first["neg_values"][0] == -3.0
    assert json.loads((tmp_path / "out" / "run_settings.json").read_text())["layer"] == 1
    skipped = json.loads((tmp_path / "out" / "skipped_indexes.json").read_text())["skipped_indexes"]
    assert len(skipped) == 317 and not {7, 12, 30} & set(skipped)
    with gzip.open(tmp_path / "out" / "explanations" / "batch-0.jsonl.gz", "rt") as handle:
        a, b = map(json.loads, handle)
    assert (a["modelId"], a["layer"], a["index"]) == ("llm", "1-mlp_activations-320", "7")
    assert (a["description"], a["typeName"], a["explanationModelName"]) == ("a word", "text", "some-llm")
    scores = [
        [(score["explanationScoreTypeName"], score["value"]) for score in row["scores"]] for row in (a, b)
    ]
    assert scores == [[("simulation", 0.75), ("eleuther_recall", 0.5)], [("eleuther_fuzz", 0.25)]]
    assert a["id"] == a["scores"][0]["explanationId"] != b["id"]
    # The same in files of two features.
    monkeypatch.setattr("sae.report.neuronpedia.FEATURES", 2)
    (tmp_path / "two").mkdir()
    run = open_run(tmp_path / "samples.pt", tmp_path / "tokens", None, None, None)
    write_neuronpedia(tmp_path / "two", run, "llm")
    batches = [json.loads((tmp_path / "two" / f"batch-{number}.json").read_text()) for number in (0, 1)]
    assert [one for part in batches for one in part["features"]] == batch["features"]
    assert [len(part["features"]) for part in batches] == [2, 1]
    rows = [
        (tmp_path / "two" / "explanations" / f"batch-{number}.jsonl.gz").read_bytes() for number in (0, 1)
    ]
    assert [gzip.decompress(part).count(b"\n") for part in rows] == [2, 0]


def test_spread_contexts_lie_in_fifths_of_the_range():
    acts = np.array([[10.0, 0], [0, 5.0], [0.5, 0], [9.0, 1.0], [3.0, 0]])
    kind = np.array([0, 1, 1, 2, 2])
    # Three tokens fire in random contexts: 1.0 in the first fifth, 3.0 in the second, 9.0 in the fifth.
    assert bins(kind, acts) == [[-1, 10, -1], [4, 6, 0], [0, 2, 0.3333], [0, 0, 0], [0, 0, 0]]


def test_neuronpedia_needs_samples_of_the_checkpoint(checkpoint, tmp_path, smollm2, stdlib):
    refused = export(checkpoint, tmp_path / "out", "--format", "neuronpedia")
    assert_refused(refused, "--samples", "neuronpedia")
    refused = export(checkpoint, tmp_path / "out", "--samples", "samples.pt")
    assert_refused(refused, "--samples and --explanations need --format neuronpedia, sae_lens came")
    (tmp_path / "own").mkdir()
    write_explained_run(tmp_path / "own", smollm2, stdlib)
    flags = ["--samples", tmp_path / "own" / "samples.pt", "--dataset_path", tmp_path / "own" / "tokens"]
    assert_refused(
        export(checkpoint, tmp_path / "out", "--format", "neuronpedia", *flags), "samples.pt", "7.pt"
    )
    assert not (tmp_path / "out").exists()
