"""What the tests of this wing share: writing a dataset in this process, and the bytes of one."""

from pathlib import Path

from sae.tokens import workers

FLAGS = {
    "num_files": 2, "num_samples_per_file": 30, "min_tokens": 16, "num_processes": 1, "add_bos": False,
    "chunk_documents": False, "tokenizer_name": "smollm2", "dataset_name": "?", "data_dir": None,
    "dataset_config": None, "split": "train", "text_field": None, "seed": 0,
}  # fmt: skip


def write(path, tokenizer_folder, bos_token_id=None, **flags):
    """Write a dataset in this process (and its workers); returns the line it ends with."""
    flags = FLAGS | {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
    said, done = workers.write_dataset(path, flags, tokenizer_folder, lambda: False, bos_token_id)
    assert done
    return said


def content(folder):
    """The bytes of all files of a dataset."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
