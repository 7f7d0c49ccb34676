"""Rows of activations -> autoencoder: the buffer, the step, revivals, figures, and the folder of a run."""

from sae.training.buffer import ShuffleBuffer, llm_batches
from sae.training.evaluation import evaluate, split_held_out
from sae.training.folder import RunFolder, bar_figures, held_out, saved_run
from sae.training.run import plan_memory, run_config, stream_start, timed_steps
from sae.training.trainer import Resampling, new_trainer, train

__all__ = [
    "Resampling", "RunFolder", "ShuffleBuffer", "bar_figures", "evaluate", "held_out", "llm_batches",
    "new_trainer", "plan_memory", "run_config", "saved_run", "split_held_out", "stream_start", "timed_steps",
    "train",
]  # fmt: skip
