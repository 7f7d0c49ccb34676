"""Rows of activations -> autoencoder: the buffer, the step, revivals, figures, and the folder of a run."""

from sae.training.run import loop, prepare, stream, timed_steps
from sae.training.trainer import new_trainer

__all__ = ["loop", "new_trainer", "prepare", "stream", "timed_steps"]
