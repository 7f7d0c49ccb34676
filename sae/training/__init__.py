"""Rows of activations -> autoencoder: the buffer, the step, revivals, figures, and the folder of a run."""

from sae.training.plan import timed_steps
from sae.training.run import loop, prepare, stream

__all__ = ["loop", "prepare", "stream", "timed_steps"]
