"""The training script as a user starts it."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, run_script, write_dataset

from sae.training.plan import forecast

SCRIPT = "train_autoencoder_from_tokens.py"


def flags(dataset, model, save_path, layer_type="mlp_activations", **more):
    values = {
        "dataset_path": dataset, "model_name": model, "save_path": save_path, "num_batches": 140,
        "batch_size_autoencoder": 128, "num_batches_preload": 30, "batches_between_ckpt": 50,
        "neuron_resampling_method": "anthropic", "neuron_resampling_interval": 60, "learning_rate": 1e-3,
        "batch_size_llm": 8,
    } | more  # fmt: skip
    words = [(f"--{name}", str(value)) for name, value in values.items()]
    named = [word for pair in words for word in pair if word]
    return ["1", layer_type, *named]


def train(*args, **more):
    return run_script(SCRIPT, *flags(*args, **more))


def contents(folder):
    """Every file of a run but images: name -> bytes."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def whole_run(small_dataset, tiny_llama, tmp_path_factory):
    """A run that nobody disturbed: two epochs, three checkpoints, a resampling."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = train(small_dataset, tiny_llama, folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_what_a_run_leaves(whole_run, small_dataset):
    folder, result = whole_run
    assert {path.name for path in folder.iterdir()} == {
        "50.pt", "100.pt", "140.pt", "resume.pt", "metrics.jsonl", "images",
    }  # fmt: skip
    assert {path.name for path in (folder / "images").iterdir()} == {
        "50.png", "100.png", "140.png", "loss_curves.png",
    }  # fmt: skip
    for path in folder.glob("*.pt"):
        torch.load(path, weights_only=True)
    content = torch.load(folder / "140.pt", weights_only=True)
    config = content["config"]
    assert config["hookpoint"] == "model.layers.1.mlp.act_fn"
    assert (config["act_vec_size"], config["dict_vec_size"], config["layer_id"]) == (48, 192, 1)
    assert (config["trained_batches"], config["trained_tokens"]) == (140, 140 * 128)
    info = json.loads((Path(small_dataset) / "tokenized_dataset.json").read_text())
    assert config["dataset_fingerprint"] == info["fingerprint"]
    assert torch.allclose(content["state_dict"]["W_dec"].norm(dim=1), torch.ones(192), atol=1e-6)
    assert content["log10_frequency"].shape == (192,)
    assert "each epoch comes in a new order" in result.stdout
    assert "tokens/s" in result.stdout.splitlines()[-1]


def test_metrics(whole_run):
    lines = [json.loads(line) for line in (whole_run[0] / "metrics.jsonl").read_text().splitlines()]
    kinds = [(line["event"], line["batch"]) for line in lines]
    assert kinds == [
        ("log", 50), ("checkpoint", 50), ("resample", 60), ("log", 100), ("checkpoint", 100),
        ("log", 140), ("checkpoint", 140),
    ]  # fmt: skip
    checkpoint = lines[-1]
    for name in (
        "l0", "explained_variance", "dead_share", "ce", "ce_sae", "ce_zero", "loss_recovered", "kl",
        "probe_f1",
    ):  # fmt: skip
        assert isinstance(checkpoint[name], float), name
    low, high = checkpoint["loss_recovered_interval"]
    assert low < checkpoint["loss_recovered"] < high
    assert (checkpoint["documents"], checkpoint["contexts"]) == (12, 24)
    assert checkpoint["frequency_tokens"] == (64 + 140 % 8) * 128
    assert {"method", "revived"} <= lines[2].keys()


def test_same_flags_same_bytes(whole_run, small_dataset, tiny_llama, tmp_path):
    assert train(small_dataset, tiny_llama, tmp_path / "again").returncode == 0
    assert contents(tmp_path / "again") == contents(whole_run[0])


def start(*args, command=None, **more):
    command = command or flags(*args, **more)
    return subprocess.Popen(
        [sys.executable, str(ROOT / SCRIPT), *command],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


def test_killed_and_resumed_ends_with_the_same_bytes(whole_run, small_dataset, tiny_llama, tmp_path):
    """kill -9 again and again, at moments drawn at random, until a run gets through."""
    rng, folder, kills = random.Random(4), tmp_path / "run", 0
    while kills < 4:
        process = start(small_dataset, tiny_llama, folder, resume="")
        seen = _written(folder)
        wait_for(lambda seen=seen: _written(folder) != seen, process)
        time.sleep(rng.uniform(0, 0.5))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        if (folder / "140.pt").exists():
            break
    (folder / ".resume.pt.abc.partial").write_text("a kill in the middle of writing leaves this")
    result = train(small_dataset, tiny_llama, folder, resume="")
    assert result.returncode == 0, result.stderr
    assert kills >= 2
    assert contents(folder) == contents(whole_run[0])


def _written(folder):
    return [(path.name, path.stat().st_mtime_ns) for path in folder.glob("*.pt")] if folder.exists() else []


@pytest.mark.parametrize(("sig", "moment"), [(signal.SIGTERM, "50.pt"), (signal.SIGINT, "resume.pt")])
def test_a_signal_saves_and_says_how_to_go_on(sig, moment, whole_run, small_dataset, tiny_llama, tmp_path):
    """resume.pt is there before the buffer is filled."""
    process = start(small_dataset, tiny_llama, tmp_path)
    wait_for((tmp_path / moment).exists, process)
    process.send_signal(sig)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130
    batch = torch.load(tmp_path / "resume.pt", weights_only=True)["trainer"]["batch"]
    assert f"stopped after batch {batch}; the same command with --resume goes on" in output
    assert "Traceback" not in output
    assert train(small_dataset, tiny_llama, tmp_path, resume="").returncode == 0
    assert contents(tmp_path) == contents(whole_run[0])


def test_a_model_that_moved_is_the_run_s_own(whole_run, small_dataset, tiny_llama, tmp_path):
    moved = shutil.copytree(tiny_llama, tmp_path / "moved")
    result = train(small_dataset, f"{moved}/", whole_run[0], resume="")
    assert result.returncode == 0 and "nothing to do" in result.stdout, result.stderr
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(moved)
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    other.save_pretrained(moved)
    assert_refused(train(small_dataset, moved, whole_run[0], resume=""), "--resume", "model_fingerprint was")


def test_resume_with_other_flags_names_them_and_changes_nothing(whole_run, small_dataset, tiny_llama):
    before = contents(whole_run[0])
    result = train(small_dataset, tiny_llama, whole_run[0], resume="", learning_rate=2e-3, seed=1)
    assert_refused(result, "learning_rate was 0.001, is 0.002", "seed was 0, is 1")
    assert_refused(train(small_dataset, tiny_llama, whole_run[0]), "--resume", "holds a run")
    assert contents(whole_run[0]) == before


def test_metrics_that_are_partly_gone_are_refused(whole_run, small_dataset, tiny_llama, tmp_path):
    shutil.copytree(whole_run[0], tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "r+b") as handle:
        handle.truncate(100)
    assert_refused(train(small_dataset, tiny_llama, tmp_path / "run", resume=""), "metrics.jsonl", "gone")


def test_resuming_a_finished_run_does_nothing(small_dataset, tiny_llama, tmp_path):
    """A buffer of more batches than there are is one of them all, in the resumed run too."""
    more = {"num_batches": 10, "num_batches_preload": 30, "resume": ""}
    assert train(small_dataset, tiny_llama, tmp_path, **more).returncode == 0
    before = contents(tmp_path)
    result = train(small_dataset, tiny_llama, tmp_path, **more, device_llm="cpu", device_autoencoder="cpu")
    assert result.returncode == 0 and "nothing to do" in result.stdout, result.stderr
    assert contents(tmp_path) == before


def test_a_full_disk_keeps_the_last_checkpoint(small_dataset, tiny_llama, tmp_path):
    """A file size limit stands in for the disk: writing the second checkpoint's resume.pt fails halfway."""
    later = {"num_batches": 290, "batches_between_ckpt": 150}  # there is time to set the limit
    process = start(small_dataset, tiny_llama, tmp_path / "new", **later)
    wait_for((tmp_path / "new" / "images" / "150.png").exists, process)
    import resource

    limit = (tmp_path / "new" / "150.pt").stat().st_size // 2
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2 and "File too large" in output and "Traceback" not in output, output
    torch.load(tmp_path / "new" / "150.pt", weights_only=True)
    torch.load(tmp_path / "new" / "resume.pt", weights_only=True)
    assert not list((tmp_path / "new").rglob("*.partial"))


def test_dry_run_estimates_and_writes_nothing(small_dataset, tiny_llama, tmp_path):
    result = train(small_dataset, tiny_llama, tmp_path / "run", dry_run="")
    assert result.returncode == 0, result.stderr
    assert "memory, GB: LLM" in result.stdout
    assert "140 batches of 128 tokens" in result.stdout
    assert re.search(r"minutes at \d+ tokens/s, .* the update is \d+% of a step", result.stdout)
    assert not (tmp_path / "run").exists()


def test_a_larger_batch_is_advised_where_it_helps():
    """300 batches of 100 tokens: 0.2 s of LLM, 0.3 of the step, of which 0.2 of the update."""
    config = {"batch_size_autoencoder": 100, "num_batches": 300}
    for apart, minutes, words in (
        (
            False,
            2.5,
            "at 200 tokens/s, checkpoints aside; the update is 67% of a step, 286 tokens/s expected",
        ),
        (True, 1.5, "at 333 tokens/s, checkpoints aside; the update is 67% of a step, 500 tokens/s expected"),
    ):
        line = f"expected: {minutes} minutes {words} with --batch_size_autoencoder 400"
        assert forecast(config, 0.2, 0.3, 0.2, apart) == line
    assert forecast(config, 0.2, 0.3, 0.03, False).endswith("the update is 10% of a step")


def test_an_llm_in_bfloat16_trains_to_the_same_figures(small_dataset, smollm2, tmp_path):
    """What --dtype_llm auto chooses where the hardware is fast at it, on the real model."""
    last = {}
    for dtype in ("float32", "bfloat16"):
        result = run_script(
            SCRIPT, 2, "mlp_activations", "--dataset_path", small_dataset, "--model_name", smollm2,
            "--save_path", tmp_path / dtype, "--dtype_llm", dtype, "--num_batches", 50,
            "--dict_vec_size", 512, "--batch_size_autoencoder", 256, "--learning_rate", 1e-3,
            "--batches_between_ckpt", 0, "--held_out_contexts", 8,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        lines = (tmp_path / dtype / "metrics.jsonl").read_text().splitlines()
        last[dtype] = {key: value for line in lines for key, value in json.loads(line).items()}
    high, low = last.values()
    assert high["explained_variance"] > 0.2
    assert low["explained_variance"] == pytest.approx(high["explained_variance"], abs=0.01)
    assert low["loss"] == pytest.approx(high["loss"], rel=0.01)
    assert low["ce_sae"] - low["ce"] == pytest.approx(high["ce_sae"] - high["ce"], abs=0.02)


def test_normalised_short_and_skipping(small_dataset, tiny_llama, tmp_path):
    """They reach the checkpoint and the number of rows; and the residual stream has a width of its own."""
    result = train(
        small_dataset, tiny_llama, tmp_path, "residual", num_batches=0, num_tokens=20, skip_positions=4,
        normalize_dataset="", batches_between_ckpt=0, residual_hookpoint="model.layers.1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (checkpoint,) = [path for path in tmp_path.glob("*.pt") if path.stem.isdigit()]
    config = torch.load(checkpoint, weights_only=True)["config"]
    held_out = 24
    assert config["trained_batches"] == (240 - held_out) * 16 // 128
    assert (config["num_tokens"], config["skip_positions"], config["normalize_dataset"]) == (20, 4, True)
    assert (config["layer_type"], config["hookpoint"], config["act_vec_size"]) == (
        "residual", "model.layers.1", 32,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_batches": -1}, ["--num_batches", "-1"]),
        ({"batch_size_llm": 0}, ["--batch_size_llm", "0"]),
        ({"batch_size_autoencoder": 0}, ["--batch_size_autoencoder", "0"]),
        ({"batch_size_autoencoder": 10**6}, ["1000000 needs at least as many tokens to train on", "13824"]),
        ({"act_vec_size": 1536}, ["--act_vec_size 48", "1536"]),
        ({"num_tokens": 65}, ["64", "65"]),
        ({"skip_positions": 64}, ["--skip_positions", "64"]),
        (
            {"num_batches": 10**9, "num_batches_preload": 10**8},
            ["--num_batches_preload 100000000", "at most"],
        ),
        ({"dict_vec_size": 10**10}, ["GB for the autoencoder needed on cpu", "--dict_vec_size"]),
        ({"learning_rate": "nan"}, ["--learning_rate", "nan"]),
        ({"seed": 2**63}, ["--seed", str(2**63)]),
        ({"device_llm": "cuda:5"}, ["--device_llm", "cuda:5"]),
        ({"dataset_path": "nowhere"}, ["tokenised dataset", "nowhere"]),
        ({"model_name": "./nowhere"}, ["nowhere"]),
        ({"mlp_activations_hookpoint": "model.layers.{}.mlp.act"}, ["closest", "model.layers.1.mlp.act_fn"]),
        (
            {"mlp_activations_hookpoint": "model.layers.2.mlp.act_fn"},
            ["--mlp_activations_hookpoint needs one {} for the layer, or 1 in its place", "layers.2"],
        ),
        ({"mlp_activations_hookpoint": "model.norm"}, ["--mlp_activations_hookpoint needs", "model.norm"]),
        ({"save_path": __file__}, ["--save_path needs a folder", "Not a directory"]),
        ({"save_path": f"{__file__}/x", "dry_run": ""}, ["--save_path needs a folder", "Not a directory"]),
    ],
)
def test_refusals(changed, words, small_dataset, tiny_llama, tmp_path):
    result = train(small_dataset, tiny_llama, **{"save_path": tmp_path / "run"} | changed)
    assert_refused(result, *words)
    assert not (tmp_path / "run").exists()


def test_refused_layers_and_vocabularies(small_dataset, tiny_llama, tmp_path):
    args = flags(small_dataset, tiny_llama, tmp_path / "run")
    assert_refused(run_script(SCRIPT, "3", *args[1:]), "0 to 2", "got 3")
    assert_refused(run_script(SCRIPT, "1", "mlp", *args[2:]), "mlp", "mlp_activations")
    big = write_dataset(tmp_path / "big", [[49152] * 64] * 4, range(4), "other", vocab_size=50000)
    assert_refused(train(big, tiny_llama, tmp_path / "run"), "49152", "other")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(train(empty, tiny_llama, tmp_path / "run"), "tokenised dataset", "empty")
