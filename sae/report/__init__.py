"""What comes after: the page of a run, and the same for Neuronpedia."""

from sae.report.neuronpedia import write as write_neuronpedia
from sae.report.page import build, open_run

__all__ = ["build", "open_run", "write_neuronpedia"]
