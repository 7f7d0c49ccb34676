"""Documents from a folder or file, from web addresses or from the hub, shared out among processes."""

import lzma
import os
import random
import re
import sys
import urllib.error
import urllib.request
import zlib
from functools import partial
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
BROKEN = (EOFError, zlib.error, lzma.LZMAError)  # what ends too early in a packed file
NEVER_SOURCE = {"parquet", "arrow", "jsonl", "ndjson"}
BESIDE_DATA = {"readme.md", "license", "license.md", "license.txt", "dataset_infos.json"}
TEXT_FIELDS = ("content", "text", "code", "document", "body", "source")
PAUSES = (1, 2, 4, 8, 16, 32, 60, 60)  # seconds
STALL_S = 60
BLOCK_TRIES = 4  # of a read from the network; none again inside a packed file, which would go on behind a gap


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

    def __init__(self, stream, text_field, name):
        self.stream = stream
        self.text_field = text_field
        self.name = name
        self.remote = "://" in name or not Path(name).exists()
        self.num_shards = stream.num_shards

    def read(self, shard):
        import datasets

        try:
            for row in self.stream.shard(num_shards=self.num_shards, index=shard):
                text = row[self.text_field]
                if not isinstance(text, str):
                    text = Skipped("no text")
                elif not _is_unicode(text):
                    text = Skipped("not Unicode")
                yield text
        except KeyError as err:
            raise InputError(f"a column {err} needed in all of {self.name}, a row lacks it") from err
        except (ValueError, *BROKEN, datasets.exceptions.DatasetsError) as err:
            if isinstance(err, BROKEN) and self.remote:
                raise ConnectionError(str(err)) from err
            raise InputError(f"readable data files needed in {self.name}: {err}") from err


def _is_unicode(text):
    try:
        return text.isascii() or text.encode() != b""
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False


def refuse_missing(name):
    """InputError where `name` can only be meant as a local path and is none."""
    local = name.startswith((".", "/", "~")) or (name.count("/") > 1 and "://" not in name)
    if local and not Path(name).exists():
        raise InputError(f"a dataset needed at --dataset_name {name}, no such file or folder")


def open_source(arguments):
    """The documents that `arguments` name, as Files or Rows; InputError where there are none."""
    name, base = arguments.dataset_name, Path(arguments.dataset_name)
    refuse_missing(name)
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
        of_split = re.compile(rf"(^|[-_./]){re.escape(arguments.split)}([-_./]|$)")
        named = [file for file in files if of_split.search(os.path.relpath(file, base))]
        return _open_rows(arguments, BUILDERS[kind], {"data_files": {arguments.split: named or files}})
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
    if kinds & NEVER_SOURCE and len(kinds) > 1:
        few = ", ".join(sorted(kind or "no ending" for kind in kinds)[:6])
        raise InputError(f"data files of one kind, or source files alone, needed in {path}, there are {few}")
    return kinds.pop() if len(kinds) == 1 and kinds <= set(BUILDERS) else None


def _remote(arguments):
    name = arguments.dataset_name
    if "://" in name and arguments.data_dir:
        raise InputError(f"--data_dir is for folders and hub datasets, --dataset_name {name} names files")
    if "://" not in name:
        return name, {"name": arguments.dataset_config, "data_dir": arguments.data_dir}
    kind = _ending(name)
    if kind not in BUILDERS:
        raise InputError(f"an address that ends in {', '.join(BUILDERS)} (or .gz) needed, got {name}")
    return BUILDERS[kind], {"data_files": {arguments.split: _spread(name)}}


def _spread(address):
    """`shard-{00..15}.parquet` as its 16 addresses."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", address)
    if not match:
        return [address]
    first, last = match.groups()
    numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [address[: match.start()] + number + address[match.end() :] for number in numbers]


def _open_rows(arguments, name, options):
    import datasets

    if "://" in arguments.dataset_name:
        import aiohttp

        timeout = aiohttp.ClientTimeout(sock_connect=STALL_S, sock_read=STALL_S)
        options["storage_options"] = {"client_kwargs": {"timeout": timeout}}
    try:
        builder = datasets.load_dataset_builder(name, **options)
        files = [str(file) for split in (builder.config.data_files or {}).values() for file in split]
        # A broken connection is mended block by block here at first, and shard by shard in `_persistent`.
        tries = 1 if any(Path(file).suffix in {*PACKINGS, ".zip"} for file in files) else BLOCK_TRIES
        datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = tries
        datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 1
        datasets.config.TORCH_AVAILABLE = False  # a stream would load it, which takes longer than all else
        stream = builder.as_streaming_dataset(split=arguments.split)
        field = _text_field(arguments, stream)
    except datasets.exceptions.DatasetNotFoundError as err:
        login = "; `hf auth login` or HF_TOKEN gives access to gated and private ones"
        raise InputError(f"a dataset needed, got {name!r}: {err}{login}") from err
    except FileNotFoundError as err:
        if "://" in arguments.dataset_name:
            raise _refusal(arguments.dataset_name, err) from err
        raise InputError(f"data files needed in {arguments.dataset_name!r}: {err}") from err
    except (ValueError, *BROKEN, datasets.exceptions.DatasetsError) as err:
        if isinstance(err, BROKEN) and not Path(arguments.dataset_name).exists():
            raise ConnectionError(str(err)) from err  # a connection that broke, and is tried again
        raise InputError(f"a dataset that opens needed, got {arguments.dataset_name!r}: {err}") from err
    return Rows(stream, field, arguments.dataset_name)


def _refusal(address, err):
    """An unfindable web address as the error it is: fsspec calls a busy server (503) a missing file, too."""
    try:
        urllib.request.urlopen(urllib.request.Request(_spread(address)[0], method="HEAD"), timeout=STALL_S)
    except urllib.error.HTTPError as answer:
        if 400 <= answer.code < 500 and answer.code not in (408, 429):
            return InputError(f"data files needed at {address}, the server answers {answer.code}")
    except (OSError, ValueError):
        pass
    return ConnectionError(str(err))


def open_patiently(arguments, pause, pauses=PAUSES):
    """`open_source`, tried again after a network error."""
    if "://" not in arguments.dataset_name and Path(arguments.dataset_name).exists():
        return open_source(arguments)
    return next(_persistent(lambda: iter([open_source(arguments)]), 0, pause, pauses))


def _text_field(arguments, stream):
    row = next(iter(stream), None)
    if row is None:
        raise InputError(f"documents needed in {arguments.dataset_name}, it holds none")
    texts = [key for key, value in row.items() if isinstance(value, str)]
    found = [field for field in TEXT_FIELDS if field in texts] or (texts if len(texts) == 1 else [])
    if arguments.text_field in row or (arguments.text_field is None and found):
        return arguments.text_field or found[0]
    came = f"{arguments.text_field!r} is none of them" if arguments.text_field else "none looks like text"
    raise InputError(f"--text_field needed, a column of {', '.join(row)}: {came}")


def _persistent(read, index, pause, pauses=PAUSES):
    """The documents of `read()` from `index` on; after a network error they are read again from there."""
    import aiohttp
    import httpx2

    failures = 0
    while True:
        try:
            for text in islice(read(), index, None):
                index, failures = index + 1, 0
                yield text
            return
        except (OSError, EOFError, aiohttp.ClientError, httpx2.HTTPError) as err:
            if failures == len(pauses):
                raise ConnectionError(f"the network failed {failures + 1} times in a row: {err}") from err
            said = f"network error ({type(err).__name__}: {err}), trying again in {pauses[failures]} s"
            print(f"\n{said}", file=sys.stderr, flush=True)
            pause(pauses[failures])
            failures += 1


def read_documents(source, seed, process, processes, pause, position):
    """The documents that `process` of `processes` reads, from `position` ([0, 0, 0]: the beginning) on.

    Yields (position after it, text or Skipped). Shards are shuffled by `seed` and dealt out; where there are
    fewer shards than processes, the documents themselves are dealt out. `pause(seconds)` waits for a network.
    """
    turn, index, count = position
    shards = random.Random(seed).sample(range(source.num_shards), source.num_shards)
    deal = source.num_shards < processes
    shards = shards if deal else shards[process::processes]
    while turn < len(shards):
        read = partial(source.read, shards[turn])
        remote = isinstance(source, Rows) and source.remote
        for text in _persistent(read, index, pause) if remote else islice(read(), index, None):
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
