"""The folder of a run: checkpoints, metrics, pictures, and the state that going on needs."""

import json
import os
import time
from pathlib import Path

import torch

from sae import InputError
from sae.artifacts import load_pt, save_pt
from sae.autoencoder import save_checkpoint
from sae.plots import frequency_histogram, loss_curves

RESUME_SECONDS = 900  # between two writes of resume.pt where checkpoints are further apart


def saved_run(path, config, resume):
    """What resume.pt in `path` holds, None for a new run.

    Raises InputError where a run would be overwritten, or was started with other flags than `config`.
    """
    path = Path(path)
    holds_run = any(path.glob("*.pt")) or (path / "metrics.jsonl").exists()
    if not resume:
        if holds_run:
            raise InputError(f"an empty --save_path or --resume needed, {path} holds a run")
        return None
    if not (path / "resume.pt").exists():
        if any(path.glob("*.pt")):
            raise InputError(f"--resume needs {path}/resume.pt, which is not there")
        return None
    saved = load_pt(path / "resume.pt", "the state of a run", ("config", "trainer", "metrics_bytes"))
    if (path / "metrics.jsonl").stat().st_size < saved["metrics_bytes"]:
        raise InputError(f"--resume needs all of {path}/metrics.jsonl, some of it is gone")
    before = saved["config"]
    given = {k: v for k, v in config.items() if k != "num_batches_preload" or v is not None}
    differ = [f"{k} was {before.get(k)}, is {v}" for k, v in given.items() if before.get(k) != v]
    if differ:
        raise InputError(f"--resume needs the flags and data of the run in {path}: {'; '.join(differ)}")
    return saved


class RunFolder:
    """`save_path` of a run; `config` decides its results, `saved` is what `saved_run` gave."""

    def __init__(self, path, config, saved):
        self.path, self.config, self.saved_at = Path(path), config, time.monotonic()
        self._metrics = self.path / "metrics.jsonl"
        self.path.mkdir(parents=True, exist_ok=True)
        for partial in self.path.rglob(".*.partial"):  # what a kill in the middle of writing left
            partial.unlink()
        with open(self._metrics, "ab") as handle:
            # Lines that were written after resume.pt: their steps are trained again.
            handle.truncate(saved["metrics_bytes"] if saved else 0)

    def append(self, events):
        if events:
            with open(self._metrics, "a") as handle:
                handle.writelines(json.dumps(event) + "\n" for event in events)

    def metrics(self):
        return [json.loads(line) for line in self._metrics.read_text().splitlines()]

    def resume_is_old(self):
        return time.monotonic() - self.saved_at > RESUME_SECONDS

    def save_resume(self, trainer):
        """All that only going on needs, in one atomic file."""
        trainer.finite_losses()  # refuses to replace a good state by a broken one
        with open(self._metrics, "ab") as handle:
            os.fsync(handle.fileno())
            size = handle.tell()
        state = {"config": self.config, "trainer": trainer.state(), "metrics_bytes": size}
        save_pt(self.path / "resume.pt", state)
        self.saved_at = time.monotonic()

    def save_checkpoint(self, trainer, figures):
        """`<trained_batches>.pt`, a metrics line, plots; resume.pt last: a kill between repeats all."""
        trainer.finite_losses()
        batch, tokens = trainer.batch, trainer.batch * self.config["batch_size_autoencoder"]
        log10_frequency = trainer.take_log10_frequency()
        config = self.config | {"trained_batches": batch, "trained_tokens": tokens}
        save_checkpoint(self.path / f"{batch}.pt", config, trainer.autoencoder, log10_frequency)
        dead_share = torch.isinf(log10_frequency).float().mean().item()
        event = {"batch": batch, "event": "checkpoint", "tokens": tokens, **figures, "dead_share": dead_share}
        self.append([event])
        title = f"{Path(config['model_name']).name} {config['hookpoint']}, {tokens:,} tokens"
        frequency_histogram(self.path / "images" / f"{batch}.png", log10_frequency, title)
        loss_curves(self.path / "images" / "loss_curves.png", self.metrics(), title)
        self.save_resume(trainer)
        return event


def bar_figures(events):
    """What of the newest events the progress bar shows."""
    shown = {}
    for event in events:
        if event["event"] == "log":
            shown |= {"loss": f"{event['loss']:.4g}", "L0": f"{event['l0']:.1f}", "dead": event["dead"]}
        if event["event"] == "checkpoint":
            shown |= {"held out": held_out(event)}
    return shown


def held_out(event):
    """A checkpoint's held-out figures in a line."""
    return (
        f"L0 {event['l0']:.1f}, explained variance {_three(event['explained_variance'])}, loss recovered "
        f"{_three(event['loss_recovered'])} ({event['ce_sae']:.3f} for {event['ce']:.3f}), "
        f"dead {event['dead_share']:.1%}"
    )


def _three(value):
    return "undefined" if value is None else f"{value:.3f}"
