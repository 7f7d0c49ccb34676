"""Text -> tokenised dataset: contexts of equal length in Arrow files, and reading them back."""

from sae.tokens.dataset import open_dataset, read_contexts
from sae.tokens.sources import refuse_missing
from sae.tokens.workers import read_finished, write_dataset

__all__ = ["open_dataset", "read_contexts", "read_finished", "refuse_missing", "write_dataset"]
