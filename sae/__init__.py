"""Sparse autoencoders on code models: tokens, activations, training, samples, explanations."""

import importlib

__version__ = "0.2.0"
# What programs import from here, and the room it is in: opened when it is first used.
ROOMS = {"load_autoencoder": "autoencoder", "load_samples": "samples", "search": "explanations"}


class InputError(ValueError):
    """What the user handed in cannot be used. The message is one line: what was needed and what came."""


def __getattr__(name):
    if name not in ROOMS:
        raise AttributeError(f"module 'sae' has no attribute {name!r}")
    room = importlib.import_module(f"sae.{ROOMS[name]}")
    return getattr(room, "load_checkpoint" if name == "load_autoencoder" else name)
