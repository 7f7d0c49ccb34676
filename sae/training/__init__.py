"""Rows of activations -> autoencoder: the buffer, the step, revivals, figures, and the folder of a run."""

from sae.training.run import loop, prepare, stream, timed_steps

__all__ = ["loop", "prepare", "stream", "timed_steps"]
