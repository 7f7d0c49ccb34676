"""sae.export: folders that other tools open, model cards."""

import json

import pytest
import torch
from conftest import assert_refused, run_module
from safetensors.torch import load_file

from sae import InputError
from sae.autoencoder import Autoencoder, load_checkpoint, save_checkpoint
from sae.export import export as write
from sae.export import sae_lens_config

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
    assert cfg["metadata"]["seqpos_slice"] == [2, 32]
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
    result = export(checkpoint, tmp_path / "out", "--format", "safetensors")
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
    write(checkpoint, tmp_path / "without", "safetensors")
    card = ModelCard.load(tmp_path / "without" / "README.md")
    assert "No metrics" in card.text and card.data.library_name is None


def test_nothing_is_overwritten_and_no_part_is_left(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert_refused(export(checkpoint, tmp_path / "out"), "new or empty folder", tmp_path / "out")
    (tmp_path / "torn.pt").write_bytes(checkpoint.read_bytes()[:100])
    for path, came in ((tmp_path / "none.pt", "no such file"), (tmp_path / "torn.pt", "truncated")):
        with pytest.raises(InputError, match=f"{path.name}.*{came}"):
            write(path, tmp_path / "new", "sae_lens")
    assert_refused(export(checkpoint, tmp_path / "new", "--format", "onnx"), "onnx", "sae_lens")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "run", "torn.pt"]


@pytest.mark.parametrize(
    ("architecture", "theirs"),
    [("relu", "standard"), ("topk", "topk"), ("batchtopk", "jumprelu"), ("jumprelu", "jumprelu")],
)
def test_sae_lens_knows_each_architecture_by_its_own_name(architecture, theirs):
    config = {"act_vec_size": 8, "dict_vec_size": 16, "model_name": "m", "hookpoint": "h", "k": 5}
    cfg = sae_lens_config(config | {"architecture": architecture})
    assert cfg["architecture"] == theirs
    topk = {"k": 5, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    assert {key: cfg[key] for key in ("k", "rescale_acts_by_decoder_norm") if key in cfg} == topk
