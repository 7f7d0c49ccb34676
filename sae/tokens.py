"""Token shards on disk: reading them back (and, further down, writing them)."""

import json
from pathlib import Path

from sae import InputError

INFO_FILE = "tokenized_dataset.json"


def open_dataset(path):
    """The dataset at `path` (columns `input_ids`, `document`) and its info (tokenizer_name, ...).

    Raises InputError where there is none, it is empty, or it is no tokenised dataset.
    """
    import datasets

    path = Path(path)
    if not (path / INFO_FILE).is_file():
        came = f"no {INFO_FILE} in it" if path.exists() else "no such folder"
        raise InputError(f"a tokenised dataset needed at {path}, {came}")
    try:
        info = json.loads((path / INFO_FILE).read_text())
        dataset = datasets.load_from_disk(str(path))
        missing = {"input_ids", "document"} - set(dataset.column_names)
    except (OSError, ValueError, AttributeError) as err:
        raise InputError(f"a tokenised dataset needed at {path}, it does not open: {err}") from err
    if missing or len(dataset) == 0:
        came = f"it lacks the columns {sorted(missing)}" if missing else "it holds no context"
        raise InputError(f"a tokenised dataset needed at {path}, {came}")
    return dataset, info


def read_contexts(dataset, rows, batch_size, num_tokens=0):
    """Batches of contexts: int64 ids [<= batch_size, T] of the dataset's `rows` in their order.

    T is the first `num_tokens` tokens of each context, 0: all of them.
    """
    torch_view = dataset.with_format("torch", columns=["input_ids"])
    for start in range(0, len(rows), batch_size):
        ids_BT = torch_view[[int(row) for row in rows[start : start + batch_size]]]["input_ids"].long()
        yield ids_BT[:, :num_tokens] if num_tokens else ids_BT
