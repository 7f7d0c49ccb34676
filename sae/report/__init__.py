"""What comes after: the page of a run."""

from sae.report.page import build

__all__ = ["build"]
