"""Documents from a folder or file, from web addresses or from the hub, shared out among processes."""

import json
import os
import random
import re
from collections import deque
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from sae import InputError, artifacts
from sae.tokens import datafiles
from sae.tokens.datafiles import READERS, Skipped, kind

DATA = READERS.keys() - {"txt"}
# Beside data files of these kinds lie no source files; json, csv and tsv are found among source files, too.
ONLY_DATA = DATA - {"json", "csv", "tsv"}
BESIDE_DATA = {"md", "cff", "bib", "yaml", "yml", "png", "jpg", "jpeg", "svg", "gif", "pdf"}
ABOUT_DATA = {"readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing"}
DESCRIPTIONS = {"state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test",
          "evaluation": "test", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation"}  # fmt: skip
TEXT_FIELDS = ("content", "text", "code", "document", "body", "source")
ROLES = {"human": "user", "gpt": "assistant"}  # in conversations of {"from", "value"}
ROWS_LOOKED_AT = 1000  # to find the column of the text


class Source(NamedTuple):
    """Files in which each row is a document: the text of one column, or of several joined.

    `columns` None: source files, each of them a document.
    """

    paths: list
    columns: list | None = None
    tokenizer: str | None = None  # folder; its chat template makes a text of messages

    def read(self, path):
        """The text of each document of a file, or Skipped."""
        rows = datafiles.read_rows(path, self.columns) if self.columns else datafiles.read_source_file(path)
        for row in rows:
            yield self.text(row) if isinstance(row, dict) else row

    def text(self, row):
        parts = [row[column] for column in self.columns if row.get(column) is not None]
        parts = [_chat(part, self.tokenizer) if isinstance(part, list) else part for part in parts]
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
    if artifacts.is_missing(name):
        raise InputError(f"a dataset needed at --dataset_name {name}, no such file or folder")


def open_source(name, data_dir=None, dataset_config=None, split="train", text_field=None, tokenizer=None):
    """The documents that the flags name, InputError where there are none. `tokenizer`: as in Source."""
    refuse_missing(name)
    if not re.fullmatch(r"[\w.-]+", split):
        raise InputError(f"--split needs the name of a split, without a slice, got {split!r}")
    if "://" in name:
        if data_dir or dataset_config:
            raise InputError(f"--data_dir and --dataset_config are not for addresses of files such as {name}")
        paths = _addresses(name)
    elif not Path(name).exists():
        paths = _hub_files(name, data_dir, dataset_config, split)
    elif dataset_config:
        raise InputError(f"--dataset_config is for hub datasets, --data_dir names a folder within {name}")
    else:
        paths, is_data = _local_files(Path(name), data_dir, split)
        if not is_data:
            if len(paths) == 1 and isinstance(first := next(datafiles.read_source_file(paths[0])), Skipped):
                needed = f"--dataset_name needs text or data files ({', '.join(READERS)})"
                raise InputError(f"{needed}, {paths[0]} is none: {first.reason}")
            return Source(paths)
    unknown = {kind(path) or path for path in paths} - set(READERS)
    if unknown:
        raise InputError(f"data files of {', '.join(READERS)} needed in {name}, got {min(unknown)}")
    rows = islice(chain.from_iterable(map(datafiles.read_rows, paths)), ROWS_LOOKED_AT)
    rows = [row for row in rows if not isinstance(row, Skipped)]
    if not rows:
        raise InputError(f"documents needed in {name}, it holds none")
    source = Source(paths, _text_columns(rows, text_field), tokenizer)
    source.text(rows[0])  # refuses messages where there is no template
    return source


@cache
def _chat_tokenizer(folder):
    from sae.models import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise InputError("a column of messages needs a tokenizer with a chat template, this has none")
    return tokenizer


def _chat(messages, tokenizer):
    """The text of messages by a tokenizer's template, Skipped where that refuses them."""
    tokenizer = _chat_tokenizer(tokenizer)
    try:
        if "from" in messages[0]:
            messages = [{"role": ROLES.get(m["from"], m["from"]), "content": m["value"]} for m in messages]
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template is a program of its own, and the messages are anybody's
        return Skipped("refused by the chat template")


def _text_columns(rows, wanted):
    """The columns of the text: those that are wanted, or the one that names and rows show."""
    values = {
        column: [row[column] for row in rows if row.get(column) not in (None, "")]
        for column in dict.fromkeys(chain.from_iterable(rows))
    }
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
    found = (
        [column for column in named if values[column]]
        or (named if not in_words else [])
        # Ids and hashes have no words; a column that is empty so far may be the one that is meant.
        or (in_words if len(in_words) == 1 and all(values.values()) else [])
        or (of_text if len(values) == 1 else [])
    )
    if not found:
        raise InputError(f"{said}: none looks like text")
    return found[:1]


def _local_files(base, data_dir, split):
    """(paths, whether they are data files)."""
    if (base / "snapshots").is_dir():  # as the hub's client keeps a dataset
        ref, base = base / "refs" / "main", base / "snapshots"
        base /= ref.read_text().strip() if ref.is_file() else max(os.listdir(base))
    path = base / (data_dir or "")
    if not path.exists():
        raise InputError(f"a folder or file needed at {path} (--dataset_name with --data_dir), there is none")
    left_out = []
    files = list(_walk(str(path), set(), left_out))
    for link in left_out[:3]:
        print(f"a link is left out, it leads to nothing or to what is read anyway: {link}")
    if not files:
        raise InputError(f"documents needed in {path}, it holds no file")
    reader = _data_reader(path, files)
    if reader:
        files = [f for f in files if READERS.get(kind(f)) is reader and f.name not in DESCRIPTIONS]
        files = _of_split(path, [file for file in files if not _is_cache(file)], split)
    elif split != "train":
        raise InputError(f"source files have no splits, --split {split} came")
    return [str(file) for file in files], bool(reader)


def _walk(path, seen, left_out):
    """All files that are not hidden, in order; a link to nothing, or to what was `seen`, is `left_out`."""
    real = os.path.realpath(path)
    if real in seen or not os.path.exists(real):
        left_out.append(path)
        return
    seen.add(real)
    if os.path.isfile(real):
        yield Path(path)
    elif os.path.isdir(real):
        for name in sorted(os.listdir(real)):
            if not name.startswith(".") and name != "__pycache__":
                yield from _walk(f"{path}/{name}", seen, left_out)


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


def _described(path, key):
    """What a description that `datasets` wrote has under `key`; None where it is none or missing."""
    try:
        return json.loads(path.read_text())[key]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_cache(file):
    """Arrow files that `save_to_disk` does not list in its state.json are caches of that dataset."""
    listed = _described(file.parent / "state.json", "_data_files")
    return bool(listed) and file.name not in {each["filename"] for each in listed}


def _of_split(path, files, split):
    """The files whose names or folders name the split; those that name none are for training."""
    own = _described(path / "dataset_dict.json", "splits") or ()
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


def _addresses(name):
    """`shard-{00..15}.parquet` as its 16 addresses."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not match:
        return [name]
    (first, last), (head, tail) = match.groups(), (name[: match.start()], name[match.end() :])
    return [f"{head}{n:0{len(first)}d}{tail}" for n in range(int(first), int(last) + 1)]


def _hub_files(name, data_dir, dataset_config, split):
    """The addresses (hf://...) of the files of a hub dataset's split."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, dataset_config, data_dir=data_dir)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as err:
        unknown = isinstance(err, datasets.exceptions.DatasetNotFoundError)
        login = "; `hf auth login` or HF_TOKEN gives access to gated and private ones" if unknown else ""
        raise InputError(f"a dataset that opens needed, got {name!r}: {err}{login}") from err
    splits = builder.config.data_files or {}
    if split not in splits:
        there = ", ".join(map(str, splits)) or "no files"
        raise InputError(f"--split needs one of {name}, which has {there}, got {split!r}")
    return [str(file) for file in splits[split]]


def read_documents(opened, seed, process, processes, turns=None):
    """What `process` of `processes` reads: a document of each source in turn, until all have ended.

    Yields (turns after it, text or Skipped). `turns`: [which source, its files read, documents read of the
    next file] of each source that has not ended, the one whose turn it is first; None: the beginning.
    """
    turns = deque(turns or ([n, 0, 0] for n in range(len(opened))))
    streams = {n: _read_share(opened[n], seed, process, processes, *at) for n, *at in turns}
    while turns:
        n, *_at = turns.popleft()
        after, text = next(streams[n], (None, None))
        if after:
            turns.append([n, *after])
            yield list(turns), text


def _read_share(source, seed, process, processes, files_read, index):
    """The shards of a source, shuffled, are dealt out; where they are fewer than processes, its documents."""
    shards = random.Random(seed).sample(source.paths, len(source.paths))
    whole = len(shards) >= processes
    parts = [[path] for path in shards[process::processes]] if whole else [shards]
    first, step = (0, 1) if whole else (process, processes)
    for number in range(files_read, len(parts)):
        texts = chain.from_iterable(map(source.read, parts[number]))
        for text in islice(texts, first + index * step, None, step):
            index += 1
            yield (number, index), text
        index = 0
