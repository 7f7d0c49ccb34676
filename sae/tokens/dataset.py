"""Token shards on disk: reading them back, and writing them so that a killed run can go on.

While it grows, a dataset lies in a hidden folder beside its place: `plan.json` (the flags), `tokenizer.json`,
per worker a file that is being written with its state (how many of its bytes count, where the documents
go on), and `dataset/` with the finished files, which is moved to its place at the very end.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sae import InputError, __version__, artifacts
from sae.artifacts import save_json

INFO_FILE = "tokenized_dataset.json"
ROWS_PER_BATCH = 1000
SECONDS_BETWEEN_STATES = 2.0


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
    needed = {"tokenizer_name": str, "vocab_size": int, "min_tokens": int, "rows": int, "fingerprint": str}
    wrong = [
        k for k, kind in needed.items() if not isinstance(info, dict) or not isinstance(info.get(k), kind)
    ]
    if wrong:
        raise InputError(f"a tokenised dataset needed at {path}, its {INFO_FILE} lacks {', '.join(wrong)}")
    length = getattr(dataset.features["input_ids"], "length", None)
    if (info["rows"], info["min_tokens"]) != (len(dataset), length):
        raise InputError(
            f"{info['rows']} contexts of {info['min_tokens']} tokens needed by {path / INFO_FILE}, "
            f"there are {len(dataset)} of {length}"
        )
    return dataset, info


def read_contexts(dataset, rows, batch_size, num_tokens=0):
    """Batches of contexts: int64 ids [<= batch_size, T] of the dataset's `rows` in their order.

    T is the first `num_tokens` tokens of each context, 0: all of them.
    """
    torch_view = dataset.with_format("torch", columns=["input_ids"])
    for start in range(0, len(rows), batch_size):
        ids_BT = torch_view[[int(row) for row in rows[start : start + batch_size]]]["input_ids"].long()
        yield ids_BT[:, :num_tokens] if num_tokens else ids_BT


@dataclass
class State:
    """How far one worker is. `windows` contexts of the document at `position` are written already."""

    position: list | None = None
    documents: int = 0
    long_enough: int = 0
    windows: int = 0
    skipped: dict = field(default_factory=dict)
    files: int = 0
    rows: int = 0
    bytes: int = 0
    fingerprints: list = field(default_factory=list)
    max_token_id: int = 0

    def counts(self):
        """Of the documents looked at, also the one that is being cut."""
        last = int(self.windows > 0)
        return {
            "documents": self.documents + last,
            "long_enough": self.long_enough + last,
            "skipped": dict(self.skipped),
        }


class ArrowFiles:
    """One worker's files, in batches of rows; they count from the last saved state on."""

    def __init__(self, folder, plan, process, state):
        import pyarrow as pa

        self.folder, self.plan, self.state = folder, plan, state
        self.per_worker = plan["num_files"] // plan["num_processes"]
        self.first_file = process * self.per_worker
        ids = pa.list_(pa.int32(), plan["min_tokens"])
        self.schema = pa.schema([("input_ids", ids), ("document", pa.int64())])
        self.partial = folder / f"worker-{process:05d}.partial"
        self.state_path = _state_path(folder, process)
        self.pending, self.snapshot, self.saved = [], asdict(state), time.monotonic()
        if not self.full and self._path().exists():  # killed after it got its name, before the state said so
            os.replace(self._path(), self.partial)
        self.handle = self._open()

    @property
    def full(self):
        return self.state.files == self.per_worker

    @property
    def contexts(self):
        return self.state.files * self.plan["num_samples_per_file"] + self.state.rows + len(self.pending)

    def _path(self):
        number = self.first_file + self.state.files
        return self.folder / "dataset" / f"data-{number:05d}-of-{self.plan['num_files']:05d}.arrow"

    def add(self, ids, document):
        self.pending.append((ids, document))
        if len(self.pending) == min(ROWS_PER_BATCH, self.plan["num_samples_per_file"] - self.state.rows):
            self._write_batch()

    def _write_batch(self):
        import numpy as np
        import pyarrow as pa

        state = self.state
        if not state.bytes:
            state.bytes += self.handle.write(self.schema.serialize())
        ids_NT = np.array([ids for ids, _document in self.pending], dtype=np.int32)
        ids = pa.FixedSizeListArray.from_arrays(pa.array(ids_NT.reshape(-1)), ids_NT.shape[1])
        documents = pa.array([document for _ids, document in self.pending], pa.int64())
        batch = pa.record_batch([ids, documents], schema=self.schema)
        state.bytes += self.handle.write(batch.serialize())
        state.rows += len(self.pending)
        state.max_token_id = max(state.max_token_id, int(ids_NT.max()))
        self.pending = []
        if state.rows == self.plan["num_samples_per_file"]:
            self._finish_file()
        self.snapshot = asdict(state)
        if state.bytes == 0 or time.monotonic() - self.saved > SECONDS_BETWEEN_STATES:
            self.save()

    def _finish_file(self):
        path = self._path()
        self.handle.write(b"\xff\xff\xff\xff\0\0\0\0")  # ends an Arrow stream
        self._sync()
        self.handle.close()
        os.replace(self.partial, path)
        artifacts.sync_folder(path.parent)
        self.state.fingerprints.append(content_fingerprint(path))
        self.state.files, self.state.rows, self.state.bytes = self.state.files + 1, 0, 0
        self.handle = self._open()

    def _open(self):
        if self.full:
            return None
        handle = open(self.partial, "r+b" if self.state.bytes else "wb")  # noqa: SIM115
        if self.state.bytes:
            handle.truncate(self.state.bytes)
            handle.seek(self.state.bytes)
        return handle

    def _sync(self):
        self.handle.flush()
        os.fsync(self.handle.fileno())

    def save(self):
        """From now on the batches written so far count."""
        if self.handle:
            self._sync()
        save_json(self.state_path, self.snapshot)
        self.saved = time.monotonic()


def content_fingerprint(path):
    """SHA-256 of the rows of an Arrow file, however they are batched."""
    import pyarrow as pa

    ids_hash, documents_hash = hashlib.sha256(), hashlib.sha256()
    with pa.memory_map(str(path)) as source:
        for batch in pa.ipc.open_stream(source):
            ids_hash.update(batch.column("input_ids").flatten().to_numpy())
            documents_hash.update(batch.column("document").to_numpy())
    return hashlib.sha256(ids_hash.digest() + documents_hash.digest()).hexdigest()


def _state_path(folder, process):
    return folder / f"worker-{process:05d}.json"


def load_states(folder, plan):
    """The workers' states, fresh ones where there are none."""
    paths = [_state_path(folder, process) for process in range(plan["num_processes"])]
    return [State(**json.loads(path.read_text())) if path.exists() else State() for path in paths]


def write_info(folder, plan, states, vocab_size):
    """What makes the finished Arrow files in `folder` a dataset; returns the info that lies beside them."""
    digest = hashlib.sha256("".join(f for state in states for f in state.fingerprints).encode())
    arguments = ("data_dir", "dataset_config", "split", "text_field")
    skipped = {}
    for state in states:
        for reason, count in state.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    info = {
        "tokenizer_name": plan["tokenizer_name"],
        "tokenizer_fingerprint": plan["tokenizer_fingerprint"],
        "vocab_size": vocab_size,
        "max_token_id": max(state.max_token_id for state in states),
        "dataset_name": plan["dataset_name"],
        "dataset_arguments": {key: plan[key] for key in arguments},
        **{key: plan[key] for key in ("min_tokens", "chunk_documents", "seed")},
        **{key: plan[key] for key in ("num_files", "num_samples_per_file", "num_processes")},
        "rows": plan["num_files"] * plan["num_samples_per_file"],
        "documents": sum(state.counts()["documents"] for state in states),
        "documents_long_enough": sum(state.counts()["long_enough"] for state in states),
        "documents_skipped": dict(sorted(skipped.items())),
        "fingerprint": digest.hexdigest()[:16],
        "suite_version": __version__,
    }
    ids = {"feature": {"dtype": "int32", "_type": "Value"}, "length": plan["min_tokens"], "_type": "List"}
    features = {"input_ids": ids, "document": {"dtype": "int64", "_type": "Value"}}
    save_json(folder / "dataset_info.json", {"features": features})
    state = {
        "_data_files": [{"filename": path.name} for path in sorted(folder.glob("data-*.arrow"))],
        "_fingerprint": info["fingerprint"],
        "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
        "_output_all_columns": False, "_split": None,
    }  # fmt: skip
    save_json(folder / "state.json", state)
    save_json(folder / INFO_FILE, info)
    return info
