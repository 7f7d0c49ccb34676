"""Documents from a folder or file, from web addresses or from the hub, shared out among processes."""

import json
import os
import random
import re
import sys
import time
import urllib.error
import urllib.request
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from sae import InputError
from sae.tokens import datafiles
from sae.tokens.datafiles import READERS, Skipped, kind

# Beside data files of these kinds lie no source files; json, csv and tsv are found among source files, too.
ONLY_DATA = {"parquet", "arrow", "jsonl", "ndjson"}
DATA = ONLY_DATA | {"json", "csv", "tsv"}
BESIDE_DATA = {"md", "cff", "bib", "yaml", "yml", "png", "jpg", "jpeg", "svg", "gif", "pdf"}
ABOUT_DATA = {"readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing"}
DESCRIPTIONS = {"state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test",
          "evaluation": "test", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation"}  # fmt: skip
TEXT_FIELDS = ("content", "text", "code", "document", "body", "source")
ROLES = {"human": "user", "gpt": "assistant"}  # in conversations of {"from", "value"}
ROWS_LOOKED_AT = 1000  # to find the column of the text
PAUSES = (1, 2, 4, 8, 16, 32, 60, 60)  # seconds


class SourceArguments(NamedTuple):
    """What the user asked for. `seed` orders the files (shards); `text_field` None: to be found."""

    dataset_name: str
    data_dir: str | None
    dataset_config: str | None
    split: str
    text_field: list | None
    seed: int


class SourceFiles(NamedTuple):
    """A tree of plain source files (or one): each file is one document."""

    paths: list
    left_out: list  # links
    remote: bool = False
    columns: list | None = None

    def read(self, path):
        try:
            text = Path(path).read_bytes().decode()
        except UnicodeDecodeError:
            yield Skipped("not UTF-8")
        except OSError:
            yield Skipped("cannot be read")
        else:
            yield Skipped("holds NUL") if "\0" in text else text


class DataFiles(NamedTuple):
    """Data files, each row a document: the text of one column, or of several joined."""

    paths: list
    left_out: list
    remote: bool
    columns: list | None = None
    chat: object = None  # function: messages -> text or Skipped

    def read(self, path):
        for row in self.rows(path):
            yield row if isinstance(row, Skipped) else self.text(row)

    def rows(self, path):
        """Dicts with `columns`, with all where these are not known; Skipped for what is no row."""
        try:
            yield from datafiles.read_rows(path, self.columns)
        except datafiles.BROKEN as err:
            if not self.remote or isinstance(err, ValueError):
                raise InputError(f"readable data files needed, {path} is none: {err}") from err
            raise _refusal(path, err) if isinstance(err, FileNotFoundError) else ConnectionError(err) from err

    def text(self, row):
        parts = [row[column] for column in self.columns if row.get(column) is not None]
        parts = [self.chat(part) if isinstance(part, list) else part for part in parts]
        if not parts or not all(isinstance(part, str) for part in parts):
            return next((part for part in parts if isinstance(part, Skipped)), Skipped("no text"))
        text = "".join(parts)
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            return Skipped("not Unicode")
        return text


def refuse_missing(name):
    """InputError where `name` can only be meant as a local path and is none."""
    local = name.startswith((".", "/", "~")) or (name.count("/") > 1 and "://" not in name)
    if local and not Path(name).exists():
        raise InputError(f"a dataset needed at --dataset_name {name}, no such file or folder")


def open_source(arguments, chat):
    """The documents that `arguments` name, InputError where there are none. `chat` renders messages."""
    name = arguments.dataset_name
    refuse_missing(name)
    if not re.fullmatch(r"[\w.-]+", arguments.split):
        raise InputError(f"--split needs the name of a split, without a slice, got {arguments.split!r}")
    if "://" in name:
        source = DataFiles(_addresses(arguments), [], True)
    elif not Path(name).exists():
        source = DataFiles(_hub_files(arguments), [], True)
    else:
        source = _local_files(arguments)
    if isinstance(source, SourceFiles):
        return source
    unknown = {kind(path) or path for path in source.paths} - set(READERS)
    if unknown:
        raise InputError(f"data files of {', '.join(READERS)} needed in {name}, got {sorted(unknown)[0]}")
    rows = chain.from_iterable(map(source.rows, source.paths))
    rows = [row for row in islice(rows, ROWS_LOOKED_AT) if not isinstance(row, Skipped)]
    if not rows:
        raise InputError(f"documents needed in {name}, it holds none")
    source = source._replace(columns=_text_columns(rows, arguments.text_field), chat=chat)
    source.text(rows[0])  # refuses messages where there is no template
    return source


def chat_template(tokenizer_folder):
    """A function: messages -> their text by a tokenizer's template, Skipped where that refuses them."""

    @cache
    def tokenizer():
        from sae.models import load_tokenizer

        loaded = load_tokenizer(str(tokenizer_folder))
        if not loaded.chat_template:
            raise InputError("a column of messages needs a tokenizer with a chat template, this has none")
        return loaded

    def render(messages):
        from jinja2 import TemplateError

        try:
            return tokenizer().apply_chat_template(
                [
                    {"role": ROLES.get(each["from"], each["from"]), "content": each["value"]}
                    if "from" in each
                    else each
                    for each in messages
                ],
                tokenize=False,
            )
        except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as err:
            if isinstance(err, InputError):
                raise
            return Skipped("refused by the chat template")

    return render


def _text_columns(rows, wanted):
    """The columns of the text: those that are wanted, or the one that names and rows show."""
    values = {}  # of each column, without those that are empty
    for row in rows:
        for column in row:
            values.setdefault(column, [])
            if row[column] not in (None, ""):
                values[column].append(row[column])
    said = f"--text_field needed, a column of {', '.join(map(str, values))}"
    for column in wanted or []:
        if column not in values:
            raise InputError(f"{said}: {column!r} is none of them")
        if values[column] and not any(isinstance(value, str | list) for value in values[column]):
            raise InputError(f"{said}: {column!r} holds no text")
    if wanted:
        return wanted
    of_text = [column for column in values if all(isinstance(value, str) for value in values[column])]
    in_words = [column for column in of_text if any(len(value.split()) > 1 for value in values[column])]
    named = [column for column in TEXT_FIELDS if column in of_text]
    filled = [column for column in named if values[column]]
    if filled or (named and not in_words):
        return (filled or named)[:1]
    # Ids and hashes have no words; a column that is empty so far may be the one that is meant.
    if len(in_words) == 1 and all(values.values()):
        return in_words
    if len(values) == 1 and of_text:
        return of_text
    raise InputError(f"{said}: none looks like text")


def _local_files(arguments):
    base = Path(arguments.dataset_name)
    if arguments.dataset_config:
        raise InputError(
            f"--dataset_config is for hub datasets, {base} is here: --data_dir names a folder in it"
        )
    if (base / "snapshots").is_dir():  # as the hub's client keeps a dataset
        ref = base / "refs" / "main"
        there = sorted(path.name for path in (base / "snapshots").iterdir())
        base = base / "snapshots" / (ref.read_text().strip() if ref.is_file() else there[-1])
    path = base / arguments.data_dir if arguments.data_dir else base
    if not path.exists():
        raise InputError(f"a folder or file needed at {path} (--dataset_name with --data_dir), there is none")
    files, left_out = ([path], []) if path.is_file() else _walk(path)
    if not files:
        raise InputError(f"documents needed in {path}, it holds no file")
    reader = _data_reader(path, files)
    if reader is None:
        if arguments.split != "train":
            raise InputError(f"source files have no splits, --split {arguments.split} came")
        return SourceFiles([str(file) for file in files], left_out)
    files = [file for file in files if READERS.get(kind(file)) is reader and file.name not in DESCRIPTIONS]
    files = _of_split(path, _saved_files(files), arguments.split)
    return DataFiles([str(file) for file in files], left_out, False)


def _walk(folder):
    """(files, links left out): all that is not hidden, in order; what links lead to is read once."""
    seen, files, links, left_out = {os.path.realpath(folder)}, [], [], []

    def visit(folder):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            if entry.is_dir() and (real := os.path.realpath(entry.path)) not in seen:
                seen.add(real)
                visit(entry.path)
            elif entry.is_file():
                (links if entry.is_symlink() else files).append(Path(entry.path))
            elif entry.is_dir() or entry.is_symlink():
                left_out.append(entry.path)

    visit(folder)
    own = {os.path.realpath(file) for file in files} if links else ()
    for link in links:
        if os.path.realpath(link) in own:
            left_out.append(str(link))
        else:
            files.append(link)
    return sorted(files), left_out


def _data_reader(path, files):
    """The reader of the data files that a folder is made of, None for a tree of source files."""
    kinds = {
        kind(file)
        for file in files
        if file.name not in DESCRIPTIONS and (kind(file) in DATA or file.stem.lower() not in ABOUT_DATA)
    }
    if kinds & ONLY_DATA:
        kinds -= BESIDE_DATA
    readers = {READERS[each] if each in DATA else None for each in kinds}
    if kinds & ONLY_DATA and len(readers) > 1:
        few = ", ".join(sorted(each or "no ending" for each in kinds)[:6])
        raise InputError(f"data files of one kind, or source files alone, needed in {path}, there are {few}")
    return readers.pop() if len(readers) == 1 else None


def _saved_files(files):
    """Without the Arrow files that `save_to_disk` does not list in its state.json: caches of that dataset."""
    listed = {}
    for folder in {file.parent for file in files if (file.parent / "state.json").is_file()}:
        state = json.loads((folder / "state.json").read_text())
        listed[folder] = {each["filename"] for each in state["_data_files"]}
    return [file for file in files if file.parent not in listed or file.name in listed[file.parent]]


def _of_split(path, files, split):
    """The files whose names or folders name the split; those that name none are for training."""
    saved = path / "dataset_dict.json"
    own = json.loads(saved.read_text())["splits"] if saved.is_file() else []
    names = {name.lower(): name for name in (split, *own)} | SPLITS
    word = re.compile(rf"(?<![a-z])({'|'.join(map(re.escape, names))})(?![a-z])")
    by_split = {}
    for file in files:
        found = word.findall(str(file.relative_to(path)).lower())
        by_split.setdefault(names[found[-1]] if found else "train", []).append(file)
    wanted = SPLITS.get(split, split)
    if wanted not in by_split:
        there = ", ".join(sorted(by_split))
        raise InputError(f"--split needs one of {there} in {path}, got {split!r}")
    return by_split[wanted]


def _addresses(arguments):
    """`shard-{00..15}.parquet` as its 16 addresses."""
    name = arguments.dataset_name
    if arguments.data_dir or arguments.dataset_config:
        raise InputError(
            f"--data_dir and --dataset_config are for hub datasets, --dataset_name {name} names files"
        )
    if kind(name) not in READERS:
        raise InputError(f"an address that ends in {', '.join(READERS)} (or .gz) needed, got {name}")
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not match:
        return [name]
    first, last = match.groups()
    numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [name[: match.start()] + number + name[match.end() :] for number in numbers]


def _hub_files(arguments):
    """The addresses (hf://...) of the files of a hub dataset's split."""
    import datasets

    name = arguments.dataset_name
    try:
        builder = datasets.load_dataset_builder(name, arguments.dataset_config, data_dir=arguments.data_dir)
    except datasets.exceptions.DatasetNotFoundError as err:
        login = "; `hf auth login` or HF_TOKEN gives access to gated and private ones"
        raise InputError(f"a dataset needed, got {name!r}: {err}{login}") from err
    except (FileNotFoundError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as err:
        raise InputError(f"a dataset that opens needed, got {name!r}: {err}") from err
    splits = builder.config.data_files or {}
    if arguments.split not in splits:
        there = ", ".join(splits) or "no files"
        raise InputError(f"--split needs one of {name}, which has {there}, got {arguments.split!r}")
    return [str(file) for file in splits[arguments.split]]


def _refusal(address, err):
    """An unfindable web address as the error it is: fsspec calls a busy server (503) a missing file, too."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=datafiles.STALL_S)
    except urllib.error.HTTPError as answer:
        if 400 <= answer.code < 500 and answer.code not in (408, 429):
            return InputError(f"data files needed at {address}, the server answers {answer.code}")
    except (OSError, ValueError):
        pass
    return ConnectionError(err)


def open_patiently(arguments, chat, pauses=PAUSES):
    """`open_source`, tried again after a network error."""
    if "://" not in arguments.dataset_name and Path(arguments.dataset_name).exists():
        return open_source(arguments, chat)
    return next(_persistent(lambda: iter([open_source(arguments, chat)]), 0, pauses))


def _persistent(read, index, pauses=PAUSES):
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
            time.sleep(pauses[failures])
            failures += 1


def read_documents(source, seed, process, processes, position):
    """The documents that `process` of `processes` reads, from `position` ([0, 0, 0]: the beginning) on.

    Yields (position after it, text or Skipped). Shards are shuffled by `seed` and dealt out; where there are
    fewer shards than processes, the documents themselves are dealt out.
    """
    turn, index, count = position
    shards = random.Random(seed).sample(source.paths, len(source.paths))
    deal = len(shards) < processes
    shards = shards if deal else shards[process::processes]
    while turn < len(shards):
        read = partial(source.read, shards[turn])
        for text in _persistent(read, index) if source.remote else islice(read(), index, None):
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
