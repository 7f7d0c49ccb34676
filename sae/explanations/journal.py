"""The journal of explanations: one JSON document a line, on disk before anything else happens with it."""

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path

from sae import InputError, artifacts

# What all documents of a journal, and of an index, have in common; and what one that differs in it holds.
ORIGIN = {
    "autoencoder_fingerprint": "features of another autoencoder",
    "samples_fingerprint": "explanations from other samples",
    "interpretation_model": "explanations by another LLM",
    "simulation": "scores of another simulation",
    "settings": "explanations with other settings",
}


def read_journal(path):
    """What a journal holds: ({dim: document}, bytes of a torn last line). A missing file is empty.

    A torn last line (a run was killed, or is just writing) is left out; a bad one before it is an InputError.
    """
    documents, torn = {}, 0
    lines = Path(path).read_bytes().splitlines(keepends=True) if Path(path).exists() else []
    for number, line in enumerate(lines, 1):
        try:
            document = json.loads(line)
            is_one = line.endswith(b"\n") and isinstance(document["dim"], int)
        except (ValueError, TypeError, KeyError):
            is_one = False
        if is_one:
            documents[document["dim"]] = document
        elif number < len(lines):
            raise InputError(f"a journal of explanations needed, line {number} of {path} is no document")
        else:
            torn = len(line)
    return documents, torn


def check_journal(documents, origin, path):
    """Refuse to go on with a journal of other samples, another interpreter or other settings."""
    for document in documents.values():
        refuse_other(f"the journal {path}", document, origin, "move it away to begin anew")


def refuse_other(where, made_from, origin, what_to_do):
    """Refuse what lies in `where` when it was not made as this run makes its documents, naming both."""
    for key, what in ORIGIN.items():
        came, needed = made_from.get(key), origin.get(key)
        if came != needed:
            raise InputError(f"{where} holds {what}, {came} instead of {needed}: {what_to_do}")


class Journal(AbstractContextManager):
    """Appends documents to the file at `path`, whose torn last line it cuts off before.

    When `append` returns, the line survives a power cut.

    with Journal(path) as journal:
        journal.append({"dim": 7, ...})
    """

    def __init__(self, path):
        self._handle = open(path, "ab")  # noqa: SIM115, closed in __exit__
        artifacts.lock(self._handle, f"a journal of its own needed, another run is writing {path}")
        # What was written until the lock was ours belongs to it.
        self._handle.truncate(self._handle.seek(0, os.SEEK_END) - read_journal(path)[1])
        artifacts.sync(Path(path).parent)

    def append(self, document):
        # allow_nan: NaN is no JSON, the server would refuse what the journal holds.
        self._handle.write(json.dumps(document, allow_nan=False).encode() + b"\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def __exit__(self, *_error):
        self._handle.close()
