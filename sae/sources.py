"""Documents from a folder or file, from web addresses or from the hub, shared out among processes."""

import random
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from sae import InputError

BUILDERS = {
    "parquet": "parquet",
    "arrow": "arrow",
    "jsonl": "json",
    "ndjson": "json",
    "json": "json",
    "csv": "csv",
}
PACKINGS = {".gz", ".zst", ".bz2", ".xz"}
NEVER_SOURCE = {"parquet", "arrow", "jsonl", "ndjson"}
BESIDE_DATA = {"readme.md", "license", "license.md", "license.txt", "dataset_infos.json"}
TEXT_FIELDS = ("content", "text", "code", "document", "body", "source")
PAUSES = (1, 2, 4, 8, 16, 32, 60, 60)


class Skipped(NamedTuple):
    """A document that holds no usable text, and why."""

    reason: str


class SourceArguments(NamedTuple):
    """What the user asked for. `seed` orders the files (shards); `text_field` None: to be found."""

    dataset_name: str
    data_dir: str | None
    dataset_config: str | None
    split: str
    text_field: str | None
    seed: int


class Files:
    """A tree of plain source files (or one): each file is a shard of one document."""

    def __init__(self, paths):
        self.paths = paths
        self.num_shards = len(paths)

    def read(self, shard):
        try:
            text = Path(self.paths[shard]).read_bytes().decode()
        except UnicodeDecodeError:
            text = Skipped("not UTF-8")
        else:
            if "\0" in text:
                text = Skipped("holds NUL")
        yield text


class Rows:
    """A streamed `datasets` dataset; its shards are its data files."""

    def __init__(self, stream, text_field):
        self.stream = stream
        self.text_field = text_field
        self.num_shards = stream.num_shards

    def read(self, shard):
        rows = self.stream.shard(num_shards=self.num_shards, index=shard)
        for row in rows:
            text = row[self.text_field]
            if not isinstance(text, str):
                yield Skipped("no text")
            else:
                yield text if _is_unicode(text) else Skipped("not Unicode")


def _is_unicode(text):
    try:
        return text.isascii() or text.encode() != b""
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False


def open_source(arguments):
    """The documents that `arguments` name, as Files or Rows; InputError where there are none."""
    name, base = arguments.dataset_name, Path(arguments.dataset_name)
    if "://" in name or not base.exists():
        return _open_rows(arguments, *_remote(arguments))
    path = base / arguments.data_dir if arguments.data_dir else base
    if not path.exists():
        raise InputError(f"a folder or file needed at {path} (--dataset_name with --data_dir), there is none")
    files = [path] if path.is_file() else sorted(_visible_files(path))
    if {"state.json", "dataset_info.json"} <= {file.name for file in files}:
        files = [file for file in files if file.suffix == ".arrow"]
    kind = _data_kind(path, files)
    if kind:
        files = [str(file) for file in files if _ending(file) == kind]
        return _open_rows(arguments, BUILDERS[kind], {"data_files": {arguments.split: files}})
    if not files:
        raise InputError(f"documents needed in {path}, it holds no file")
    return Files([str(file) for file in files])


def _visible_files(folder):
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and "__pycache__" not in path.parts:
            yield path


def _ending(path):
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in PACKINGS]
    return suffixes[-1][1:].lower() if suffixes else ""


def _data_kind(path, files):
    """Which kind of data file a folder is made of, None for a tree of source files."""
    beside = [file for file in files if file.name.lower() not in BESIDE_DATA]
    kinds = {_ending(file) for file in beside}
    data = kinds & set(NEVER_SOURCE) or (kinds if len(kinds) == 1 and kinds <= set(BUILDERS) else set())
    if len(data) > 1:
        raise InputError(f"data files of one kind needed in {path}, there are {', '.join(sorted(data))}")
    return data.pop() if data else None


def _remote(arguments):
    name = arguments.dataset_name
    if "://" not in name:
        return name, {"name": arguments.dataset_config, "data_dir": arguments.data_dir}
    kind = _ending(name)
    if kind not in BUILDERS:
        raise InputError(f"an address that ends in {', '.join(BUILDERS)} (or .gz) needed, got {name}")
    return BUILDERS[kind], {"data_files": {arguments.split: _spread(name)}}


def _spread(address):
    """`shard-{00..15}.parquet` as its 16 addresses."""
    import re

    match = re.search(r"\{(\d+)\.\.(\d+)\}", address)
    if not match:
        return [address]
    first, last = match.groups()
    numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [address[: match.start()] + number + address[match.end() :] for number in numbers]


def _open_rows(arguments, name, options):
    import datasets

    stream = datasets.load_dataset(name, split=arguments.split, streaming=True, **options)
    return Rows(stream, arguments.text_field or _find_text_field(arguments, stream))


def _find_text_field(arguments, stream):
    row = next(iter(stream), None)
    if row is None:
        raise InputError(f"documents needed in {arguments.dataset_name}, it holds none")
    texts = [key for key, value in row.items() if isinstance(value, str)]
    for field in TEXT_FIELDS:
        if field in texts:
            return field
    if len(texts) == 1:
        return texts[0]
    raise InputError(f"--text_field needed for {arguments.dataset_name}; its columns are {', '.join(row)}")


def read_documents(source, seed, process, processes, position):
    """The documents that `process` of `processes` reads, from `position` ([0, 0, 0]: the beginning) on.

    Yields (position after it, text or Skipped). Shards are shuffled by `seed` and dealt out; where there are
    fewer shards than processes, the documents themselves are dealt out.
    """
    turn, index, count = position
    shards = random.Random(seed).sample(range(source.num_shards), source.num_shards)
    deal = source.num_shards < processes
    shards = shards if deal else shards[process::processes]
    while turn < len(shards):
        for text in islice(source.read(shards[turn]), index, None):
            index, count = index + 1, count + 1
            if not deal or (count - 1) % processes == process:
                yield [turn, index, count], text
        turn, index = turn + 1, 0


def alternate(readers, position):
    """One document of each reader in turn, until all have ended.

    `readers` are functions position -> documents; `position` is None at the beginning.
    """
    turn, positions = position or (0, [[0, 0, 0]] * len(readers))
    positions = list(positions)
    streams = [reader(start) for reader, start in zip(readers, positions, strict=True)]
    ended = 0
    while ended < len(streams):
        after, text = next(streams[turn], (None, None))
        turn_after = (turn + 1) % len(streams)
        if after is None:
            ended += 1
        else:
            ended, positions[turn] = 0, after
            yield [turn_after, list(positions)], text
        turn = turn_after
