"""The rows of one data file: parquet, Arrow, JSON, csv or tsv; packed or not; on disk, the web or the hub."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import time
import zipfile
import zlib
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sae import InputError

ROWS_AT_ONCE = 64
STALL_S = 60
PAUSES = (1, 2, 4, 8, 16, 32, 60, 60)  # seconds, between the tries of a network that fails
# What a file that is torn, damaged or of another kind raises in one of the libraries that read it.
BROKEN = (
    OSError, ValueError, EOFError, NotImplementedError,
    zlib.error, lzma.LZMAError, zipfile.BadZipFile, csv.Error,
)  # fmt: skip


class Skipped(NamedTuple):
    """A document that holds no usable text, and why."""

    reason: str


def kind(path):
    """The ending that says what a file holds: `jsonl` for `a.jsonl.gz`."""
    return next((suffix[1:] for suffix in _suffixes(path) if suffix not in PACKINGS), "")


def _suffixes(path):
    """Those of a file or address, the last one first."""
    path = str(path).split("?")[0] if "://" in str(path) else path
    return [suffix.lower() for suffix in reversed(PurePosixPath(path).suffixes)]


def read_source_file(path):
    """The text of a source file, or Skipped."""
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError:
        yield Skipped("not UTF-8")
    except OSError:
        yield Skipped("cannot be read")
    else:
        yield Skipped("holds NUL") if "\0" in text else text


def read_rows(path, columns=None):
    """The rows of a file or address as dicts, Skipped for what is no row; InputError where it does not open.

    They have at least those of `columns` that there are. None: all that can hold text; and an address that
    does not open is given up after fewer tries.
    """
    try:
        for stream in _streams(path, PAUSES if columns else PAUSES[:3]):
            yield from READERS[kind(path)](stream, columns)
    except (InputError, ConnectionError):
        raise
    except BROKEN as err:
        raise InputError(f"readable data files needed, {path} is none: {err}") from err


def _streams(path, pauses):
    """The binary stream of an unpacked file; of a zip archive, that of each file in it."""
    packing = next(iter(_suffixes(path)), "")
    with _open_address(path, pauses) if "://" in path else open(path, "rb") as handle:
        if packing != ".zip":
            with PACKINGS.get(packing, io.BufferedReader)(handle) as stream:
                yield stream
            return
        with zipfile.ZipFile(handle) as archive:
            for name in archive.namelist():
                if not name.endswith("/") and not name.startswith("__MACOSX"):
                    with archive.open(name) as member:
                        yield member


def _unzstd(handle):
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(handle, "zstd"))


def _open_address(address, pauses):
    """A file of the web or the hub; what fails is read again, where the server tells its size."""
    import aiohttp
    import fsspec

    timeout = aiohttp.ClientTimeout(sock_connect=STALL_S, sock_read=STALL_S)
    options = {"client_kwargs": {"timeout": timeout}} if address.startswith("http") else {}

    def begin():
        try:
            return fsspec.open(address, "rb", **options).open()
        except FileNotFoundError as err:  # fsspec calls a busy server (503) a missing file, too
            status = getattr(err.__cause__, "status", 503)
            if status >= 500 or status in (408, 429):
                raise
            raise InputError(f"data files needed at {address}, the server answers {status}") from None

    handle = _patiently(pauses, begin)
    handle.read = partial(_patiently, PAUSES if handle.size else (), handle.read)
    return handle


def _patiently(pauses, fetch, *arguments):
    """What `fetch` returns. After a network error it is tried again; one that stays is a ConnectionError."""
    import aiohttp
    import httpx2

    for tries, pause in enumerate((*pauses, None), 1):
        try:
            return fetch(*arguments)
        except (OSError, aiohttp.ClientError, httpx2.HTTPError) as err:
            if pause is None:
                raise ConnectionError(f"the network failed {tries} times in a row: {err}") from err
            said = f"\nnetwork error ({type(err).__name__}: {err}), trying again in {pause} s"
            print(said, file=sys.stderr, flush=True)
            time.sleep(pause)


def _parquet_rows(stream, columns):
    import pyarrow.parquet as pq

    file = pq.ParquetFile(stream)
    return _table_rows(file.schema_arrow, columns, partial(file.iter_batches, ROWS_AT_ONCE))


def _arrow_rows(stream, columns):
    import pyarrow as pa

    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    pieces = (batch.slice(at, ROWS_AT_ONCE) for batch in batches for at in range(0, len(batch), ROWS_AT_ONCE))
    return _table_rows(reader.schema, columns, lambda columns: (piece.select(columns) for piece in pieces))


def _table_rows(schema, columns, batches):
    """The rows of `batches(columns=...)`, with those of `columns` that there are.

    Where these are not known, all that can hold text are read; the others (images) hold bytes, no text.
    """
    import pyarrow as pa

    heavy = (pa.types.is_struct, pa.types.is_binary, pa.types.is_large_binary)
    light = [field.name for field in schema if not any(test(field.type) for test in heavy)]
    names = [name for name in schema.names if name in columns] if columns else light
    unread = {} if columns else dict.fromkeys(schema.names, b"")
    for batch in batches(columns=names):
        for row in batch.to_pylist():
            yield unread | row


def _json_rows(stream, _columns):
    first = next((line for line in stream if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")
    if first.lstrip().startswith(b"[") or first.strip() == b"{":  # one value over many lines
        content = json.loads(first + stream.read())
        yield from content if isinstance(content, list) else [content]
        return
    for line in filter(bytes.strip, chain([first], stream)):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield row if isinstance(row, dict) else Skipped("no JSON object")


def _csv_rows(stream, _columns, delimiter=","):
    csv.field_size_limit(2**31 - 1)
    # What is not UTF-8 becomes half of a surrogate pair, and the text is skipped as no Unicode.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    yield from csv.DictReader(text, delimiter=delimiter)


def _lines(stream, _columns):
    for line in stream:
        yield {"text": line.decode(errors="surrogateescape")}


READERS = {
    "parquet": _parquet_rows, "arrow": _arrow_rows, "jsonl": _json_rows, "ndjson": _json_rows,
    "json": _json_rows, "csv": _csv_rows, "tsv": partial(_csv_rows, delimiter="\t"), "txt": _lines,
}  # fmt: skip
PACKINGS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _unzstd, ".zip": None}
