"""Autoencoder and contexts -> the evidence for each feature, and the file that keeps it."""

from sae.samples.file import RANDOM, SPREAD, TOP, Samples, load_samples, only, save_samples
from sae.samples.reading import read_activations
from sae.samples.run import prepare
from sae.samples.survey import Survey, between, in_band, nearest, wider_band

__all__ = [
    "RANDOM", "SPREAD", "TOP", "Samples", "Survey", "between", "in_band", "load_samples", "nearest", "only",
    "prepare", "read_activations", "save_samples", "wider_band",
]  # fmt: skip
