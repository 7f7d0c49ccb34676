"""Text -> tokenised dataset: contexts of equal length in Arrow files, and reading them back."""

from sae.tokens.dataset import check_tokenizer, load_tokenizer, open_dataset, read_contexts
from sae.tokens.sources import refuse_missing
from sae.tokens.workers import read_finished, write_dataset

__all__ = [
    "check_tokenizer", "load_tokenizer", "open_dataset", "read_contexts", "read_finished", "refuse_missing",
    "write_dataset",
]  # fmt: skip
