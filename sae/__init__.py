"""Sparse autoencoders on code models: tokens, activations, training, samples, explanations."""

__version__ = "0.2.0"


class InputError(ValueError):
    """What the user handed in cannot be used. The message is one line: what was needed and what came."""
