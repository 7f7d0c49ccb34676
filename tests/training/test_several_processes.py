"""Training on several processes: the losses of one whatever their number; stops, kills, and going on."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, assert_refused, run_script, write_dataset
from servers import meeting_port
from test_train_script import SCRIPT, contents, flags

from sae import InputError, load_autoencoder
from sae.processes import Processes
from sae.training import prepare
from train_autoencoder_from_tokens import parse_args

EXACT = {
    "num_batches": 100, "batch_size_autoencoder": 96, "batches_between_ckpt": 0, "batch_size_llm": 4,
    "dtype_llm": "float32", "held_out_contexts": 14, "learning_rate": 1e-2,
}  # fmt: skip
REVIVAL = {"neuron_resampling_method": "anthropic", "neuron_resampling_interval": 24}
AUXK = {"neuron_resampling_method": None, "neuron_resampling_interval": None}
RUNS = {
    "relu": REVIVAL | {"l1_coefficient": 0.3},
    "jumprelu": REVIVAL | {"neuron_resampling_method": "replacement", "target_l0": 6},
    "topk": AUXK | {"k": "5 7"},  # a sweep
    "batchtopk": AUXK | {"k": 5},
}
RUNS = {name: run | {"architecture": name} for name, run in RUNS.items()}


def start(count, command):
    """`count` processes as a launcher starts them, in this one's group."""
    port = str(meeting_port())
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    several = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=env | (several | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}),
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(running):
    """Status and output of the first; the others are waited for where it is 0, else ended."""
    said = running[0].communicate(timeout=240)[0]
    for process in running[1:]:
        if running[0].returncode:
            process.kill()
        process.communicate(timeout=240)
    assert running[0].returncode or not any(process.returncode for process in running), said
    return running[0].returncode, said


def words(*args, **more):
    """As words of their own where a flag has several values; no flag for None."""
    given = [part for word in flags(*args, **more) for part in word.split(" ")]
    while "None" in given:
        at = given.index("None")
        del given[at - 1 : at + 1]
    return given


@pytest.fixture(scope="module")
def exactly(tmp_path_factory, small_dataset, stdlib_contexts, tiny_llama):
    """(count, [folder, run, stop, more flags] of each run) -> where the folders are."""
    place = tmp_path_factory.mktemp("several")
    few = write_dataset(place / "few", stdlib_contexts[0][:20], stdlib_contexts[1][:20], tiny_llama)

    def run(count, *runs):
        listed = []
        for folder, name, stop, more in runs:
            given = EXACT | RUNS[name] | more | {"num_gpus": count}
            data = few if "few" in folder else small_dataset
            listed.append([words(data, tiny_llama, place / folder, **given), stop])
        status, said = finish(start(count, ["tests/training/train_exactly.py", json.dumps(listed)]))
        assert status == 0, said
        (place / f"said-{count}").write_text(said)
        return place

    return run


# Of 20 contexts, 2 are held out: fewer than two processes take in a round.
FEW = {"batch_size_llm": 16, "num_batches": 0, "held_out_contexts": 2}
FEW |= {"architecture": "topk", "dict_vec_size": 8, "k": 6}  # more than the features of one
DRY = {"dict_vec_size": 100_000, "dry_run": ""}


@pytest.fixture(scope="module")
def alone(exactly):
    """Each run by one process, and one that stopped."""
    runs = [(f"{name}-1", name, None, {}) for name in RUNS]
    more = ("few-1", "batchtopk", None, FEW), ("stopped-1", "relu", 57, {}), ("dry", "batchtopk", None, DRY)
    place = exactly(1, *runs, *more)
    assert torch.load(place / "stopped-1" / "resume.pt", weights_only=True)["trainer"]["batch"] > 50
    return place


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder, other):
    """Losses to float32 rounding, the same revivals, the same figures, a checkpoint with the same weights."""
    ours, theirs = lines(folder), lines(other)
    assert [(one["event"], one["batch"]) for one in ours] == [(one["event"], one["batch"]) for one in theirs]
    figures = {"l0", "dead", "explained_variance", "probe_f1", "ce", "ce_sae", "ce_zero", "kl"}
    for one, two in zip(ours, theirs, strict=True):
        if one["event"] == "resample":
            assert one == two
        for key in one.keys() & {"loss", "mse", "l1"}:
            assert two[key] == pytest.approx(one[key], rel=1e-6, abs=1e-6 * one["loss"]), (key, one["batch"])
        for key in {key for key in figures if one.get(key) is not None}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), (key, one["batch"])
        if one["event"] == "checkpoint":  # what differs by document: contexts in their order
            assert two["loss_recovered_interval"] == pytest.approx(one["loss_recovered_interval"], abs=1e-3)
    one, two = (load_autoencoder(each / f"{ours[-1]['batch']}.pt") for each in (folder, other))
    for name, weights in one.autoencoder.state_dict().items():
        assert torch.allclose(weights, two.autoencoder.state_dict()[name], atol=1e-3), name
    assert torch.equal(one.log10_frequency, two.log10_frequency)


@pytest.fixture(scope="module")
def two(exactly, alone):
    """The same by two processes, and what goes on: their own stopped run, and that of the one."""
    return exactly(
        2, *[(f"{name}-2", name, None, {}) for name in RUNS], ("few-2", "batchtopk", None, FEW),
        ("stopped-2", "relu", 57, {}), ("stopped-2", "relu", None, {"resume": ""}),
        ("stopped-1", "relu", None, {"resume": ""}), ("dry", "batchtopk", None, DRY),
    )  # fmt: skip


@pytest.mark.parametrize("name", [*RUNS, "few"])
def test_two_processes_train_as_one(name, two):
    for found in (two / f"{name}-1").rglob("metrics.jsonl"):  # of a sweep several
        assert_same_run(found.parent, two / f"{name}-2" / found.parent.relative_to(two / f"{name}-1"))
    if name == "relu":
        assert sum(one.get("revived", 0) for one in lines(two / "relu-2")) > 100


def test_as_many_go_on_to_the_same_bits_and_others_to_rounding(two):
    assert contents(two / "stopped-2") == contents(two / "relu-2")
    assert_same_run(two / "relu-1", two / "stopped-1")


def test_a_dry_run_says_what_each_needs_and_what_is_exchanged(two):
    said = {count: (two / f"said-{count}").read_text() for count in (1, 2)}
    one, half = (float(re.findall(r"autoencoder ([\d.]+),", text)[-1]) for text in said.values())
    assert 0.4 < half / one < 0.6
    line = f"{96 * 48 * 4} for rows, {96 * 48 * 4} (twice while features are dead) for reconstructions"
    assert line in said[2] and "exchange" not in said[1]
    assert "state to write 0.13," in said[2] and "to write" not in said[1]  # 28 bytes of 48 x 100,000
    assert not (two / "dry").exists()


@pytest.mark.long
def test_four_processes(exactly, alone):
    place = exactly(4, ("batchtopk-4", "batchtopk", None, {}), ("relu-4", "relu", None, {}))
    for name in ("batchtopk", "relu"):
        assert_same_run(alone / f"{name}-1", place / f"{name}-4")


def launch(*command):
    """`deepspeed` on 2 processes, in a group of its own."""
    port = str(meeting_port())
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", 2, "--master_port", port]
    return subprocess.Popen(
        [*map(str, [*launcher, ROOT / SCRIPT, *command, "--num_gpus", 2])], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def ended(launcher):
    """Status of the launcher and all that was said, once every process has ended."""
    try:
        said = launcher.communicate(timeout=240)[0]  # until the last of them closes its output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert f'{SCRIPT}", line' not in said, said  # a traceback of ours
    return launcher.returncode, said


def ranks(launcher):
    """Pids of the script's processes, by rank."""
    found = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        for word in child.cmdline():
            if word.startswith("--local_rank="):
                found[word] = child.pid
    return [found[word] for word in sorted(found)]


def once_there(path, launcher):
    while not path.exists() and launcher.poll() is None:
        time.sleep(0.01)


def test_sigterm_kill_and_going_on_alone(small_dataset, tiny_llama, tmp_path):
    """SIGTERM to `deepspeed` itself, which dies of it at once; kill -9 of the second process."""
    run = words(small_dataset, tiny_llama, tmp_path / "run")
    launcher = launch(*run)
    once_there(tmp_path / "run" / "50.pt", launcher)
    launcher.terminate()
    status, said = ended(launcher)
    assert status and said.count("stopped after batch") == 1, said
    batch = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["trainer"]["batch"]
    assert f"stopped after batch {batch}; the same command with --resume goes on" in said and batch >= 50

    launcher = launch(*run, "--resume")
    once_there(tmp_path / "run" / "100.pt", launcher)
    os.kill(ranks(launcher)[1], signal.SIGKILL)
    status, said = ended(launcher)
    assert status and said.count("another one has ended") == 1 and said.count("error:") == 1, said

    status, said = finish(start(1, [SCRIPT, *run, "--resume"]))
    assert status == 0, said
    files = {path.name for path in (tmp_path / "run").glob("*.*")}
    assert files == {"50.pt", "100.pt", "140.pt", "resume.pt", "metrics.jsonl"}
    config = torch.load(tmp_path / "run" / "100.pt", weights_only=True)["config"]
    assert not {"num_gpus", "local_rank"} & config.keys()
    result = run_script(
        "generate_interpretation_samples.py", 60, "--dataset_path", small_dataset, "--autoencoder_path",
        tmp_path / "run" / "100.pt", "--save_path", tmp_path / "s.pt", "--log_freq_lower", -5,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_smollm2_on_two_processes(small_dataset, smollm2, tmp_path):
    """The real model under the real launcher."""
    more = AUXK | {"num_batches": 60, "dict_vec_size": 512, "batches_between_ckpt": 0, "held_out_contexts": 6}
    more |= {"architecture": "batchtopk", "k": 16}
    status, said = ended(launch(*words(small_dataset, smollm2, tmp_path, **more)))
    assert status == 0 and "tokens/s" in said, said
    last = lines(tmp_path)[-1]
    assert last["explained_variance"] > 0.3 and last["l0"] == pytest.approx(16, rel=0.4)
    assert load_autoencoder(tmp_path / "60.pt").autoencoder.W_enc.shape == (1536, 512)


def test_refusals(small_dataset, tiny_llama, tmp_path, monkeypatch):
    for more, needed in [
        ({"device_llm": "cpu"}, "one process needed to choose devices, got 2"),
        ({"dict_vec_size": 1}, "--dict_vec_size of at least a feature a process needed, got 1"),
    ]:
        monkeypatch.setattr(
            sys, "argv", [SCRIPT, *flags(small_dataset, tiny_llama, tmp_path / "run", **more)]
        )
        with pytest.raises(InputError, match=needed):
            prepare(vars(parse_args()[1]), Processes(1, 2, "cpu"))
    alone = run_script(SCRIPT, *flags(small_dataset, tiny_llama, tmp_path / "run"), "--num_gpus", 2)
    assert_refused(alone, "deepspeed --num_gpus 2")
    assert not (tmp_path / "run").exists()
