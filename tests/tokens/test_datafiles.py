"""Rows of one file of each kind, packed in each way, damaged in some; and over a network that breaks."""

import gzip
import http.server
import json
import random
import re
import threading
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from sae import InputError
from sae.tokens import datafiles, sources
from sae.tokens.datafiles import Skipped

LINES = b'{"text": "a b", "n": 1}\n\n{"text": "c"}\n'


def rows(path, columns=None):
    return list(datafiles.read_rows(str(path), columns))


def pack(path, content):
    """`content` packed as the file's ending says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data/", b"")
            archive.writestr("data/a.jsonl", content)
            archive.writestr("__MACOSX/data/._a.jsonl", b"\0\5")
    elif path.suffix:
        name = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}[path.suffix]
        with pa.CompressedOutputStream(str(path), name) as stream:
            stream.write(content)
    return path


@pytest.mark.parametrize("ending", ["gz", "bz2", "zst", "zip"])
def test_packed_files(ending, tmp_path):
    path = pack(tmp_path / f"A.JSONL.{ending}", LINES)
    assert [row["text"] for row in rows(path)] == ["a b", "c"]
    many = b"".join(json.dumps({"text": f"{n} {n * n}"}).encode() + b"\n" for n in range(30_000))
    whole = pack(tmp_path / f"long.jsonl.{ending}", many)
    assert len(rows(whole)) == 30_000
    if ending != "zip":
        with open(path, "ab") as handle:  # as `cat a.gz b.gz` makes them
            handle.write(pack(tmp_path / f"b.jsonl.{ending}", b'{"text": "d"}').read_bytes())
        assert [row["text"] for row in rows(path)] == ["a b", "c", "d"]
    torn = tmp_path / f"torn.jsonl.{ending}"
    torn.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(datafiles.BROKEN):
        rows(torn)


def test_xz_files(tmp_path):
    import lzma

    text = "a b" * 50_000  # which is more than Python's csv takes unasked
    (tmp_path / "a.csv.xz").write_bytes(lzma.compress(f"\ufefftext,n\n{text},1\n".encode()))
    assert rows(tmp_path / "a.csv.xz") == [{"text": text, "n": "1"}]


def test_a_bad_line_costs_that_line_alone(tmp_path):
    lines = [
        b'{"text": "a b"}',
        b'{"text": "torn',
        b'{"text": "\xff"}',
        rb'{"text": "\ud800"}',
        b"[1, 2]",
        b"3",
        b'{"text": null}',
        b'{"other": 1}',
        '{"text": "é\u2028 x"}'.encode(),
        b"",
        b'{"text": "end"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    source = sources.Source([], columns=["text"])
    no_object, no_text = Skipped("no JSON object"), Skipped("no text")
    assert list(source.read(str(tmp_path / "a.jsonl"))) == [
        "a b", no_object, no_object, Skipped("not Unicode"), no_object, no_object, no_text, no_text,
        "é\u2028 x", "end",
    ]  # fmt: skip
    (tmp_path / "a.csv").write_bytes(b'id,text\r\n1,a b\r\n2,caf\xe9\r\n3\r\n4,c,d,e\r\n5,"f\r\ng"\r\n')
    assert list(source.read(str(tmp_path / "a.csv"))) == [
        "a b", Skipped("not Unicode"), no_text, "c", "f\r\ng",
    ]  # fmt: skip
    (tmp_path / "a.txt").write_bytes(b"a b\ncaf\xe9\n\nc")
    assert list(source.read(str(tmp_path / "a.txt"))) == ["a b\n", Skipped("not Unicode"), "\n", "c"]
    assert list(sources.Source([]).read("gone.py")) == [Skipped("cannot be read")]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a b"}, {"text": "c"}]',
        '\n[\n {"text": "a b"},\n {"text": "c"}\n]\n',
        '{"text": "a b"}\n{"text": "c"}',
    ],
)
def test_json_as_lines_or_as_one_list(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    assert rows(tmp_path / "a.json") == [{"text": "a b"}, {"text": "c"}]
    (tmp_path / "a.json").write_text(json.dumps({"text": "a b"}, indent=1))
    assert rows(tmp_path / "a.json") == [{"text": "a b"}]


def test_tables_of_every_text_type(tmp_path):
    texts = ["a b", None, "c"]
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"n": [1, 2, 3], "text": pa.array(texts).cast(kind), "blob": [b"x"] * 3})
        expected = [{"n": n + 1, "text": text, "blob": b""} for n, text in enumerate(texts)]
        if kind != pa.string_view():  # which parquet has not
            pq.write_table(table, tmp_path / "a.parquet")
            assert rows(tmp_path / "a.parquet") == expected
            assert rows(tmp_path / "a.parquet", ["text"]) == [{"text": text} for text in texts]
            assert rows(tmp_path / "a.parquet", ["none"]) == [{}] * 3
        for writer in (pa.ipc.new_stream, pa.ipc.new_file):
            with writer(tmp_path / "a.arrow", table.schema) as sink:
                sink.write_table(table, max_chunksize=2)
            assert rows(tmp_path / "a.arrow") == expected
            assert rows(tmp_path / "a.arrow", ["text"]) == [{"text": text} for text in texts]
            assert rows(tmp_path / "a.arrow", ["none"]) == [{}] * 3
    many = pa.table({"n": list(range(200))})  # in one batch, which is more than are taken at once
    for write, name in ((pq.write_table, "a.parquet"), (pa.feather.write_feather, "b.arrow")):
        write(many, tmp_path / name)
        assert [row["n"] for row in rows(tmp_path / name)] == list(range(200))


# a network that breaks


class Flaky(http.server.ThreadingHTTPServer):
    """Serves a folder. The n-th GET meets faults[n]: None, a status, "drop" or "stall" half-way."""

    daemon_threads, ranges, heads = True, "bytes", ()

    def __init__(self, folder, faults):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults, self.lock, self.over = (
            Path(folder),
            list(faults),
            threading.Lock(),
            threading.Event(),
        )
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, *_connection):
        """Clients hang up in the middle of answers here; that is no news."""

    def next_fault(self):
        with self.lock:
            return self.faults.pop(0) if self.faults else None


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments):
        pass

    def do_HEAD(self):
        self._answer(self.server.heads.pop(0) if self.server.heads else None)

    def do_GET(self):
        self._answer(self.server.next_fault())

    def _answer(self, fault):
        path = self.server.folder / self.path[1:].split("?")[0]
        status = fault if isinstance(fault, int) else 200 if path.is_file() else 404
        data, headers = path.read_bytes() if status == 200 else b"", {}
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and status == 200:
            first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
            status, headers = 206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data = data[first : last + 1]
        self.send_response(status)
        headers |= {"Accept-Ranges": self.server.ranges, "Content-Length": len(data)}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if fault else data)
        if fault in ("drop", "stall"):
            self.wfile.flush()
            self.server.over.wait(30 if fault == "stall" else 0)
            self.close_connection = True


@pytest.fixture
def serve():
    servers = []

    def begin(folder, faults=()):
        servers.append(Flaky(folder, faults))
        return servers[-1]

    yield begin
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def texts(stdlib):
    return [file.read_text()[:3000] for file in sorted(stdlib.glob("*.py"))[20:120]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("shards")
    for n in range(2):
        half = [{"content": text} for text in texts[n::2]]
        datasets.Dataset.from_list(half).to_parquet(folder / f"{n}.parquet")
        content = "\n".join(map(json.dumps, half)).encode()
        pack(folder / f"{n}.jsonl.gz", content)
        pack(folder / f"{n}.jsonl.zst", content)
    return folder


def _documents(address):
    source = sources.open_source(address)
    return [text for _turns, text in sources.read_documents([source], 0, 0, 1)]


@pytest.fixture
def pauses(monkeypatch):
    """What would have been slept, noted instead."""
    slept = []
    monkeypatch.setattr(datafiles.time, "sleep", slept.append)
    return slept


def test_a_network_that_fails_is_tried_with_growing_pauses(pauses):
    failures = [TimeoutError("silence"), ConnectionResetError("reset by peer")]

    def fetch(first, last):
        if failures:
            raise failures.pop()
        return first, last

    assert datafiles._patiently(datafiles.PAUSES, fetch, 3, 7) == (3, 7)
    assert pauses == [1, 2]
    pauses.clear()
    failures = [TimeoutError("silence")] * 9
    with pytest.raises(ConnectionError, match="failed 9 times in a row: silence"):
        datafiles._patiently(datafiles.PAUSES, fetch, 3, 7)
    assert pauses == list(datafiles.PAUSES) == sorted(pauses)


@pytest.mark.parametrize("ending", ["parquet", "jsonl.gz", "jsonl.zst"])
def test_a_connection_that_breaks_loses_and_repeats_nothing(
    ending, serve, shards, texts, monkeypatch, pauses, capsys
):
    monkeypatch.setattr(datafiles, "STALL_S", 0.5)
    faults = [503, 500, "drop", None, None, 503, "drop", "stall", "drop", 503, None, "stall", 503, "drop"]
    server = serve(shards, faults)
    read = _documents(f"{server.address}/{{0..1}}.{ending}")
    assert read in (texts[0::2] + texts[1::2], texts[1::2] + texts[0::2])
    assert server.faults == [] and len(pauses) >= 1
    assert "Timeout" in capsys.readouterr().err  # a server that is silent is not waited for


@pytest.mark.parametrize("ending", ["csv.gz", "jsonl.gz"])
def test_a_fault_within_a_packed_file_loses_nothing(ending, serve, tmp_path, pauses):
    """fsspec fetches blocks of 5 MiB: the second one fails."""
    rng = random.Random(0)
    rows = [{"content": f"{n} {rng.randbytes(9000).hex()}"} for n in range(900)]
    data = datasets.Dataset.from_list(rows)
    with gzip.open(tmp_path / f"all.{ending}", "wb") as handle:
        data.to_csv(handle) if ending.startswith("csv") else data.to_json(handle)
    assert (tmp_path / f"all.{ending}").stat().st_size > 6 << 20
    server = serve(tmp_path, [None, 503])
    assert _documents(f"{server.address}/all.{ending}") == [row["content"] for row in rows]
    assert server.faults == [] and pauses


def test_a_server_that_sends_files_only_from_their_beginning(serve, shards, texts, pauses):
    server = serve(shards)
    server.ranges = "none"
    assert _documents(f"{server.address}/0.jsonl.gz") == texts[0::2]
    server.faults = ["drop"]
    with pytest.raises(ConnectionError, match="the network failed 1 times"):
        _documents(f"{server.address}/0.jsonl.gz")


def test_addresses_that_lead_to_nothing_are_refused(serve, shards):
    server = serve(shards)
    with pytest.raises(InputError, match="the server answers 404"):
        _documents(f"{server.address}/none.parquet")
    assert len(_documents(f"{server.address}/0.jsonl.zst?download=true")) == 50


def test_a_busy_server_is_no_address_that_leads_to_nothing(serve, shards, pauses):
    server = serve(shards, [503, 429, 500])
    server.heads = [503, 429, 500]  # fsspec asks with HEAD and then GET, and finds no file; it is asked again
    assert len(_documents(f"{server.address}/0.jsonl.gz")) == 50
    assert pauses == [1, 2, 4] and not server.heads
    server.faults, server.heads = [503] * 20, [503] * 20
    with pytest.raises(ConnectionError, match="failed 4 times in a row"):  # at the start; later 9 times
        _documents(f"{server.address}/0.jsonl.gz")
