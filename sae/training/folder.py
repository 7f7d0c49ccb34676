"""The folder of a run: checkpoints, metrics, pictures, and the state that going on needs."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor
from torch.utils._pytree import tree_map_only

from sae import InputError
from sae.artifacts import load_pt, lock, save_pt
from sae.autoencoder import checkpoint
from sae.plots import draw, frequency_histogram, loss_curves
from sae.processes import ALONE

RESUME_SECONDS = 900  # between two writes of resume.pt where checkpoints are further apart


def saved_preload(paths):
    """Batches in the shuffle buffer of the run whose resume.pt lies in one of these folders; None without."""
    found = [path / "resume.pt" for path in paths if (path / "resume.pt").exists()]
    return _load_resume(found[0])["config"]["num_batches_preload"] if found else None


def tensorboard():
    """The class that writes for TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise InputError(f"--tensorboard needs its package (pip install tensorboard): {err}") from err
    return SummaryWriter


def _load_resume(path):
    # Mapped, not read: what is put into the trainer is copied out of it piece by piece.
    return load_pt(path, "the state of a run", ("config", "trainer", "metrics_bytes"), mmap=True)


class RunFolder:
    """The folder of a run, this process's alone until it ends; `config` decides the run's results.

    background: a thread writes, from a copy in the CPU's memory, and training goes on. What ails it is raised
    by the next save, or by `wait`. Of several processes (`here`) the first writes what all of them give it:
    all make the same calls. Raises InputError where another run is writing into it, where a run would be
    overwritten, or where the run to go on with was started with other flags.
    """

    def __init__(self, path, config, resume, writer=None, here=ALONE, background=False):
        self.path, self.config, self.saved_at, self._here = Path(path), config, time.monotonic(), here
        self._thread, self._writing = ThreadPoolExecutor(1) if background else None, None
        self._writer, self._board = writer, None  # for TensorBoard: the class, and one of it from `start` on
        self._metrics, self._saved = self.path / "metrics.jsonl", None
        self.wrote = f"{path} was complete"  # the newest line for the user
        self._first(self._open, resume)
        if here.from_first(bool(self._saved)) and here.rank:
            self._saved = _load_resume(self.path / "resume.pt")

    def _first(self, work, *args):
        """Call it in the first process; what ails it ends all of them."""
        with self._here.first_decides():
            if self._here.rank == 0:
                work(*args)

    def _open(self, resume):
        path, started = self.path, any(self.path.glob("*.pt"))
        if resume and started and not (self.path / "resume.pt").exists():
            raise InputError(f"--resume needs {path}/resume.pt, which is not there")
        if not resume and (started or (self._metrics.exists() and self._metrics.stat().st_size)):
            raise InputError(f"an empty --save_path or --resume needed, {path} holds a run")
        self.path.mkdir(parents=True, exist_ok=True)
        self._handle = open(self._metrics, "ab")  # noqa: SIM115, closed with the process: it holds the lock
        lock(self._handle, f"a --save_path of its own needed, another run is writing {path}")
        self._saved = self._check_saved() if resume and started else None
        for partial in self.path.rglob(".*.partial"):  # what a kill in the middle of writing left
            partial.unlink()

    def _check_saved(self):
        saved = _load_resume(self.path / "resume.pt")
        if self._handle.tell() < saved["metrics_bytes"]:
            raise InputError(f"--resume needs all of {self._metrics}, some of it is gone")
        before = saved["config"]
        given = {k: v for k, v in self.config.items() if k != "model_name"}  # the model may have moved since
        differ = [f"{k} was {before.get(k)}, is {v}" for k, v in given.items() if before.get(k) != v]
        if differ:
            raise InputError(
                f"--resume needs the flags and data of the run in {self.path}: {'; '.join(differ)}"
            )
        return saved

    @property
    def finished(self):
        return self._saved is not None and self._saved["trainer"]["batch"] == self.config["num_batches"]

    def start(self, trainer):
        """Put the trainer where the run stopped, or keep its beginning: from here on a kill loses nothing."""
        saved, self._saved = self._saved, None
        if saved:
            trainer.restore(saved["trainer"])
        self._first(self._begin, saved["metrics_bytes"] if saved else 0, trainer.batch)
        if not saved:
            self.save_resume(trainer)

    def _begin(self, metrics_bytes, batch):
        self._handle.truncate(metrics_bytes)  # what came after resume.pt comes again
        if self._writer:
            self._board = self._writer(str(self.path / "tensorboard"), purge_step=batch + 1)

    def append(self, events):
        """Add lines to metrics.jsonl."""
        self._first(self._append, events)

    def _append(self, events):
        self._handle.writelines(f"{json.dumps(event)}\n".encode() for event in events)
        self._handle.flush()
        for event in events if self._board else ():
            for name, value in event.items():
                if isinstance(value, int | float) and name != "batch":
                    self._board.add_scalar(f"{event['event']}/{name}", value, event["batch"])

    def metrics(self):
        return [json.loads(line) for line in self._metrics.read_text().splitlines()]

    def resume_is_old(self):
        """Also where writing it failed: then `save_resume` says why."""
        failed = self._writing and self._writing.done() and self._writing.exception()
        return bool(failed) or time.monotonic() - self.saved_at > RESUME_SECONDS

    def wait(self):
        """Until all is written."""
        self._first(lambda: self._writing and self._writing.result())

    def save_resume(self, trainer):
        """All that only going on needs, in one atomic file."""
        self._first(self._save, self._state(trainer))

    def save_checkpoint(self, trainer, figures):
        """A metrics line, `<trained_batches>.pt`, resume.pt (a kill before it repeats all), pictures."""
        frequencies = trainer.log10_frequency(self.config["batch_size_autoencoder"])
        self._first(self._save_checkpoint, self._state(trainer), *frequencies, figures)

    def _save_checkpoint(self, state, log10_frequency, rows, figures):
        batch, path, images = state["batch"], self.path / f"{state['batch']}.pt", self.path / "images"
        tokens = batch * self.config["batch_size_autoencoder"]
        config = self.config | {"trained_batches": batch, "trained_tokens": tokens, "frequency_tokens": rows}
        event = {"batch": batch, "event": "checkpoint", "tokens": tokens, **figures}
        event |= {"dead_share": log10_frequency.isinf().float().mean().item(), "frequency_tokens": rows}
        self._append([event])
        content = config, state["weights"], state["factor"], log10_frequency
        self._save(state, lambda: save_pt(path, checkpoint(*content)))
        self.wrote = f"wrote {path}, images/ and metrics.jsonl: {held_out(event)}"
        title = f"{Path(config['model_name']).name} {config['hookpoint']}, {tokens:,} tokens"
        draw(frequency_histogram, images / f"{batch}.png", log10_frequency, title)
        draw(loss_curves, images / "loss_curves.png", self.metrics(), title)

    def _state(self, trainer):
        """The trainer's; a copy of it (where it was gathered it is one) if training goes on meanwhile."""
        trainer.finite_losses()  # refuses to replace a good state by a broken one
        self.wait()
        state, copy = trainer.state(), self._here.count == 1
        return tree_map_only(Tensor, lambda one: one.to("cpu", copy=copy), state) if self._thread else state

    def _save(self, state, before=lambda: None):
        """Write resume.pt, and what has to be there `before`; where there is a thread, in it."""
        metrics_bytes = os.fstat(self._handle.fileno()).st_size
        content = {"config": self.config, "trainer": state, "metrics_bytes": metrics_bytes}

        def write():
            before()
            os.fsync(self._handle.fileno())
            if self._board:
                self._board.flush()
            save_pt(self.path / "resume.pt", content)

        self._writing = self._thread.submit(write) if self._thread else write()
        self.saved_at = time.monotonic()


def held_out(event):
    """A checkpoint's held-out figures in a line."""
    low, high = event["loss_recovered_interval"] or (None, None)
    values = event["explained_variance"], event["loss_recovered"], low, high
    variance, recovered, low, high = ("undefined" if one is None else f"{one:.3f}" for one in values)
    return (
        f"L0 {event['l0']:.1f}, explained variance {variance}, loss recovered {recovered} "
        f"(95%: {low} to {high}; cross-entropy {event['ce_sae']:.3f} with the reconstruction, "
        f"{event['ce']:.3f} without), dead {event['dead_share']:.1%}"
    )
