"""The folder of a run: what is written when, and what happens when writing fails."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import sae.training.folder as room
from sae import InputError
from sae.artifacts import save_pt
from sae.autoencoder import Autoencoder
from sae.processes import Processes
from sae.training import sweep
from sae.training.folder import RunFolder, tensorboard
from sae.training.run import Run
from sae.training.trainer import Trainer

FIGURES = {
    "l0": 1.0,
    "explained_variance": None,
    "loss_recovered": None,
    "loss_recovered_interval": None,
    "dead_share": 0.0,
    "ce": 1.0,
    "ce_sae": 2.0,
    "ce_zero": 3.0,
}


def rows(count, seed=1):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) * 3


def started(path, board=None):
    """A folder and its trainer after one batch of 8 rows."""
    config = {
        "batch_size_autoencoder": 8,
        "num_batches": 3,
        "model_name": "tiny",
        "hookpoint": "model.layers.1",
    }
    folder, trainer = RunFolder(path, config, False, board), Trainer(Autoencoder(6, 20), 1e-2, 0.3)
    trainer.step(rows(8))
    folder.start(trainer)
    return folder, trainer


def test_the_last_line_says_what_its_figures_are():
    said = room.held_out(FIGURES)
    assert "(95%: undefined to undefined; cross-entropy 2.000 with the reconstruction, 1.000 without)" in said


def test_a_broken_state_is_never_saved(tmp_path):
    folder, trainer = started(tmp_path)
    before = (tmp_path / "resume.pt").read_bytes()
    trainer.step(torch.full((8, 6), float("nan")))
    for save in (folder.save_resume, lambda trainer: folder.save_checkpoint(trainer, {})):
        with pytest.raises(InputError, match="batch 2 gave nan"):
            save(trainer)
    assert (tmp_path / "resume.pt").read_bytes() == before
    assert [path.name for path in tmp_path.glob("*.pt")] == ["resume.pt"]


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    first, _trainer = started(tmp_path)
    for resume in (False, True):
        with pytest.raises(InputError, match="another run is writing" if resume else "holds a run"):
            RunFolder(tmp_path, first.config, resume)
    (tmp_path / "fresh").mkdir()
    _other = RunFolder(tmp_path / "fresh", first.config, False)  # nothing is written there yet
    with pytest.raises(InputError, match="of its own needed, another run is writing"):
        RunFolder(tmp_path / "fresh", first.config, False)


def test_pictures_never_stop_a_run(tmp_path, capsys):
    """resume.pt is written before them, and what ails them is a line."""
    folder, trainer = started(tmp_path)
    (tmp_path / "images").write_text("a file where the folder of the pictures should be")
    trainer.step(rows(8))
    folder.save_checkpoint(trainer, FIGURES)
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["trainer"]["batch"] == 2
    lines = capsys.readouterr().err.split("\n")
    assert [line[:10] for line in lines if line] == ["no picture"] * 2


def test_a_picture_of_a_revival_before_the_first_line_of_the_log(tmp_path, capsys):
    folder, trainer = started(tmp_path)
    folder.append([{"event": "resample", "batch": 1, "tokens": 8}])
    folder.save_checkpoint(trainer, FIGURES | {"l0": 0.0})
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"1.png", "loss_curves.png"}
    assert folder.metrics()[-1]["dead_share"] == (trainer.fired_RF.sum(0) == 0).float().mean().item()
    assert capsys.readouterr().err == ""


def test_the_metrics_are_on_disk_before_the_state_that_counts_them(tmp_path, monkeypatch):
    folder, trainer = started(tmp_path)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    folder.save_resume(trainer)
    assert synced[0] == str(tmp_path / "metrics.jsonl") and "/.resume.pt." in synced[1]


def test_tensorboard_gets_what_the_metrics_hold(tmp_path):
    """A run that goes on takes back what was written after its last save."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, trainer = started(tmp_path / "run", tensorboard())
    for number in (2, 3):
        trainer.step(rows(8, number))
        folder.append(
            [{"event": "log", "batch": number, "tokens": 8 * number, "loss": number / 7, "dead": 1}]
        )
        if number == 2:
            folder.save_checkpoint(trainer, FIGURES | {"l0": 4.5})
    folder._board.flush()
    config, _ = folder.config, folder._handle.close()
    again = RunFolder(tmp_path / "run", config, True, tensorboard())
    again.start(trainer)
    assert trainer.batch == 2
    trainer.step(rows(8, 3))
    again.append([{"event": "log", "batch": 3, "tokens": 24, "loss": 0.25, "dead": 2, "words": "left out"}])
    again.save_resume(trainer)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = again.metrics()
    for name in ("loss", "dead", "tokens"):
        want = [(line["batch"], line[name]) for line in lines if line["event"] == "log"]
        assert [(one.step, pytest.approx(one.value)) for one in board.Scalars(f"log/{name}")] == want
    assert board.Scalars("checkpoint/l0")[0].value == 4.5
    assert "checkpoint/loss_recovered" not in board.Tags()["scalars"]


def test_tensorboard_that_is_not_there_is_a_line(tmp_path):
    """A package that cannot be imported stands in for one that is not installed."""
    (tmp_path / "tensorboard.py").write_text("raise ImportError('no such package')")
    code = "from sae.training.folder import tensorboard; tensorboard()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": f"{tmp_path}"})  # fmt: skip
    assert (
        "InputError: --tensorboard needs its package (pip install tensorboard): no such package"
        in done.stderr
    )


def in_background(path):
    """A folder whose thread writes, and its trainer, after one batch."""
    config = {"batch_size_autoencoder": 8, "num_batches": 10**9, "model_name": "tiny", "hookpoint": "mlp"}
    folder = RunFolder(path, config, False, background=True)
    trainer = Trainer(Autoencoder(6, 20, rng=torch.Generator().manual_seed(0)), 1e-2, 0.3)
    trainer.step(rows(8))
    folder.start(trainer)
    return folder, trainer


def test_training_goes_on_while_a_state_is_written(tmp_path, monkeypatch):
    """What is written is the state at the time of the save, and resume.pt comes after the checkpoint."""
    folder, trainer = in_background(tmp_path)
    folder.wait()
    go, order = threading.Event(), []

    def slowly(path, content):
        assert go.wait(60)
        order.append(path.name)
        save_pt(path, content)

    monkeypatch.setattr("sae.training.folder.save_pt", slowly)
    want = {name: value.clone() for name, value in trainer.autoencoder.state_dict().items()}
    size = (tmp_path / "metrics.jsonl").stat().st_size
    folder.save_checkpoint(trainer, dict(FIGURES))
    metrics = (tmp_path / "metrics.jsonl").stat().st_size
    trainer.step(rows(8, 2))
    folder.append([{"event": "log", "batch": 2, "tokens": 16}])
    assert not (tmp_path / "1.pt").exists() and not folder.resume_is_old()
    go.set()
    folder.wait()
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert order == ["1.pt", "resume.pt"] and size < metrics == saved["metrics_bytes"]
    for weights in (
        saved["trainer"]["weights"],
        torch.load(tmp_path / "1.pt", weights_only=True)["state_dict"],
    ):
        assert all(torch.equal(weights[name], value) for name, value in want.items())
    assert not torch.equal(trainer.autoencoder.W_dec, want["W_dec"])


def test_what_ails_the_thread_is_raised(tmp_path, monkeypatch):
    folder, trainer = in_background(tmp_path)
    folder.wait()

    def fails(path, content):  # of the checkpoint alone; resume.pt, behind it, is not replaced
        if path.name == "1.pt":
            raise OSError("no space left")
        save_pt(path, content)

    monkeypatch.setattr("sae.training.folder.save_pt", fails)
    before = (tmp_path / "resume.pt").read_bytes()
    folder.save_checkpoint(trainer, dict(FIGURES))
    concurrent.futures.wait([folder._writing])
    assert folder.resume_is_old()  # so that the loop saves, and this is raised
    for call in (lambda: folder.save_resume(trainer), folder.wait):
        with pytest.raises(OSError, match="no space left"):
            call()
    assert (tmp_path / "resume.pt").read_bytes() == before


def test_a_full_disk_of_the_first_process_is_told_to_all(tmp_path, monkeypatch):
    """Whatever it writes; `first_decides` ends the others with the reason."""
    told = []

    class Two(Processes):
        def everyone(self, value):
            told.append(value)
            return [value, None]

    def fails(*_what):
        raise OSError("No space left")

    here = Two(0, 2, "cpu")
    folder = RunFolder(tmp_path, {}, False, here=here)
    folder._handle.close()
    folder._handle = open("/dev/full", "ab", buffering=0)  # noqa: SIM115, always full, of no length
    monkeypatch.setattr(sweep, "write", fails)
    run = Run(**dict.fromkeys(Run._fields) | {"folders": [folder] * 2, "here": here})
    for write, words in (
        (lambda: folder.append([{"event": "log"}]), "No space left"),
        (lambda: folder.start(SimpleNamespace(batch=0)), "Invalid argument"),
        (run.compare, "No space left"),
    ):
        told.clear()
        with pytest.raises(OSError, match=words):
            write()
        assert words in told[-1]


def write_all_the_time(path):
    torch.set_num_threads(1)
    room.draw = lambda *_picture: None
    folder, trainer = in_background(path)
    for number in itertools.count(2):
        trainer.step(rows(8, number))
        folder.append([{"event": "log", "batch": number, "tokens": 8 * number}])
        if number % 3 == 0:
            folder.save_checkpoint(trainer, dict(FIGURES))


def test_a_kill_leaves_the_last_whole_state(tmp_path):
    """kill -9 at moments drawn at random, while a thread writes all the time and steps go on."""
    rng, batches = random.Random(5), []
    for run in range(6):
        path, child = tmp_path / str(run), os.fork()
        if not child:
            with contextlib.ExitStack() as stack:
                stack.callback(os._exit, 1)
                write_all_the_time(path)
        while not (path / "resume.pt").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = torch.load(path / "resume.pt", weights_only=True)
        batches.append(saved["trainer"]["batch"])
        lines = (path / "metrics.jsonl").read_bytes()[: saved["metrics_bytes"]].decode().splitlines()
        assert [json.loads(line)["batch"] for line in lines][-1:] == batches[-1:][: len(lines)]
        assert {f"{number}.pt" for number in range(3, batches[-1] + 1, 3)} <= {
            x.name for x in path.glob("*.pt")
        }
        folder, trainer = RunFolder(path, saved["config"], True), Trainer(Autoencoder(6, 20), 1e-2, 0.3)
        folder.start(trainer)
        assert trainer.batch == batches[-1] and not list(path.rglob("*.partial"))
    assert max(batches) > 3
