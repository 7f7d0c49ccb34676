"""The script and its worker processes: what they write, and that nothing which happens to them changes it."""

import gzip
import http.server
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, assert_refused, run_script
from tokenizers import Tokenizer

from sae import InputError
from sae.tokens import dataset as tokens
from sae.tokens import sources
from sae.tokens import workers as tokenise

SCRIPT = "generate_tokenized_dataset.py"
FLAGS = {
    "num_files": 2, "num_samples_per_file": 30, "min_tokens": 16, "num_processes": 1,
    "chunk_documents": False, "tokenizer_name": "smollm2", "dataset_name": "?", "data_dir": None,
    "dataset_config": None, "split": "train", "text_field": None, "seed": 0,
}  # fmt: skip
LARGE = {"num_files": 64, "num_samples_per_file": 1000, "num_processes": 2, "chunk_documents": True}
# What the script does, without the seconds that loading a tokenizer with transformers takes.
DRIVER = """
import json, sys
from tokenizers import Tokenizer
from sae import cli
from sae.tokens import workers as tokenise
if __name__ == "__main__":
    path, flags, tokenizer = sys.argv[1:]
    tokenizer = Tokenizer.from_file(tokenizer).to_str()
    with cli.Parser("").friendly_errors(), cli.stop_requested() as stopping:
        said, done = tokenise.write_dataset(path, json.loads(flags), tokenizer, 49152, stopping)
    print(said)
    sys.exit(0 if done else 130)
"""


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return Tokenizer.from_file(f"{smollm2}/tokenizer.json")


@pytest.fixture(scope="session")
def texts(stdlib):
    """200 documents: pieces of the standard library, some of them too short."""
    files = [file.read_text()[:3000] for file in sorted(stdlib.glob("*.py"))[20:60]]
    return [files[n % 40][100 * (n // 40) :][: 40 if n % 7 == 0 else 3000] for n in range(200)]


@pytest.fixture(scope="session")
def parquet(tmp_path_factory, texts):
    """The documents in one parquet file."""
    path = tmp_path_factory.mktemp("parquet") / "all.parquet"
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    return path


def write(path, tokenizer, **flags):
    """Write a dataset in this process (and its workers); returns the line it ends with."""
    flags = FLAGS | {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
    said, done = tokenise.write_dataset(path, flags, tokenizer.to_str(), 49152, lambda: False)
    assert done
    return said


def content(folder):
    """The bytes of all files of a dataset."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_the_script_writes_what_the_contract_says(tmp_path, smollm2, parquet, texts, tokenizer):
    flags = ["--num_processes", 2, "--min_tokens", 16, "--tokenizer_name", smollm2, "--dataset_name", parquet]
    result = run_script(SCRIPT, 4, 15, "--save_path", tmp_path / "out", *flags)
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"wrote 60 contexts of 16 tokens in 4 files to .*out in .* s \(.* tokens/s\)", result.stdout
    )
    assert "60/60" in result.stderr and "of documents long enough" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    dataset, info = tokens.open_dataset(tmp_path / "out")
    assert [
        datasets.Dataset.from_file(str(path)).num_rows for path in sorted((tmp_path / "out").glob("*.arrow"))
    ] == [15] * 4
    assert dataset.features["input_ids"] == datasets.List(datasets.Value("int32"), length=16)
    assert dataset.features["document"] == datasets.Value("int64")
    numbers = dataset["document"][:]
    assert len(set(numbers)) == 60  # no document twice, though both processes read one shard
    for worker, share in enumerate((numbers[:30], numbers[30:])):
        assert share == sorted(share) and {number % 2 for number in share} == {worker}
    for row, number in enumerate(numbers):
        assert dataset[row]["input_ids"] == tokenizer.encode(texts[number], add_special_tokens=False).ids[:16]
    assert info["tokenizer_name"] == smollm2 and info["dataset_name"] == str(parquet)
    assert (info["vocab_size"], info["min_tokens"], info["rows"], info["seed"]) == (49152, 16, 60, 0)
    assert info["max_token_id"] == max(max(ids) for ids in dataset["input_ids"])
    assert info["dataset_arguments"]["text_field"] == "text"
    again = {"num_files": 4, "num_samples_per_file": 15, "num_processes": 2, "tokenizer_name": smollm2}
    write(tmp_path / "again", tokenizer, dataset_name=parquet, **again)
    assert content(tmp_path / "again") == content(tmp_path / "out")
    write(tmp_path / "other", tokenizer, dataset_name=parquet, num_samples_per_file=29)
    assert tokens.open_dataset(tmp_path / "other")[1]["fingerprint"] != info["fingerprint"]
    assert "complete already" in write(tmp_path / "again", tokenizer, dataset_name=parquet, **again)
    with pytest.raises(InputError, match="--min_tokens was 16, 17 came"):
        write(tmp_path / "again", tokenizer, dataset_name=parquet, **again, min_tokens=17)


def test_chunked_documents_keep_every_full_window(tmp_path, parquet, texts, tokenizer):
    write(tmp_path / "out", tokenizer, dataset_name=parquet, chunk_documents=True, num_samples_per_file=1100)
    dataset, _info = tokens.open_dataset(tmp_path / "out")
    expected = []
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        expected += [(number, ids[i : i + 16]) for i in range(0, len(ids) - 15, 16)]
    assert [(row["document"], row["input_ids"]) for row in dataset] == expected[:2200]


def test_several_data_dirs_alternate(tmp_path, tokenizer):
    for name in "ab":
        (tmp_path / "tree" / name).mkdir(parents=True)
        for n in range(20):
            (tmp_path / "tree" / name / f"{n}.py").write_text(f"{name} = {n}\n" * 10)
    flags = {"data_dir": ["b", "a"], "num_processes": 2, "num_samples_per_file": 9, "seed": 3}
    write(tmp_path / "out", tokenizer, dataset_name=tmp_path / "tree", **flags)
    dataset, _info = tokens.open_dataset(tmp_path / "out")
    for worker in range(2):
        rows = dataset.select(range(9 * worker, 9 * worker + 9))
        assert rows["document"][:] == list(range(worker, 18, 2))
        assert [tokenizer.decode(ids)[0] for ids in rows["input_ids"]] == list("babababab")


def test_files_without_text_are_counted_skipped_and_said(tmp_path, tokenizer):
    (tmp_path / "tree").mkdir()
    for n in range(6):
        (tmp_path / "tree" / f"{n}.py").write_text("value = 1\n" * 10)
    (tmp_path / "tree" / "empty.py").write_text("")
    for n in range(3):
        (tmp_path / "tree" / f"latin{n}.py").write_bytes(b"caf\xe9 " * 50)
    (tmp_path / "tree" / "binary.py").write_bytes(b"value\0" * 50)
    # Six of eleven files will do: all are read, for the seed decides which comes last.
    flags = {"num_files": 1, "num_samples_per_file": 6, "seed": 2}
    said = write(tmp_path / "out", tokenizer, dataset_name=tmp_path / "tree", **flags)
    info = json.loads((tmp_path / "out" / tokens.INFO_FILE).read_text())
    read = info["documents"] - sum(info["documents_skipped"].values())
    assert set(info["documents_skipped"]) == {"not UTF-8", "holds NUL"} and read in (6, 7)
    assert f"{info['documents_skipped']['not UTF-8']} skipped (not UTF-8)" in said


def test_a_document_of_300_mb(tmp_path, tokenizer):
    with open(tmp_path / "huge.py", "w") as handle:
        for _ in range(300):
            handle.write("def function(argument):\n    return argument + 1\n" * (1_000_000 // 48))
    head = tokenizer.encode((tmp_path / "huge.py").open().read(100_000), add_special_tokens=False).ids
    for chunk, rows in ((False, 1), (True, 50)):
        flags = {"num_files": 1, "num_samples_per_file": rows, "min_tokens": 256, "chunk_documents": chunk}
        write(tmp_path / f"out{chunk}", tokenizer, dataset_name=tmp_path / "huge.py", **flags)
        dataset, _info = tokens.open_dataset(tmp_path / f"out{chunk}")
        assert dataset["input_ids"][:] == [head[i : i + 256] for i in range(0, 256 * rows, 256)]


# what happens to processes


@pytest.fixture
def start(tmp_path, smollm2, stdlib):
    """Starts a run over the standard library in a process group of its own; all are ended afterwards."""
    (tmp_path / "driver.py").write_text(DRIVER)
    started = []

    def begin(path, **flags):
        flags = FLAGS | LARGE | {"dataset_name": str(stdlib)} | flags
        command = [
            sys.executable,
            tmp_path / "driver.py",
            path,
            json.dumps(flags),
            f"{smollm2}/tokenizer.json",
        ]
        pipe = subprocess.PIPE
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        run = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=environment
        )
        started.append(run)
        return run

    yield begin
    for run in started:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, stdlib, tokenizer):
    """The dataset that `start` would write, written in peace."""
    path = tmp_path_factory.mktemp("undisturbed") / "out"
    write(path, tokenizer, dataset_name=stdlib, **LARGE)
    return content(path)


def wait_for(condition, run, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and run.poll() is None, run.communicate()
        time.sleep(0.005)


def _workers(pid):
    """The worker processes of a run."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"multiprocessing-fork" in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_killed_at_ten_random_moments_the_bytes_are_the_same(start, tmp_path, undisturbed):
    folder, rng, kept = tmp_path / ".out.partial", random.Random(0), {}

    def finished():
        return {path.name: path.stat().st_mtime_ns for path in (folder / "dataset").glob("*")}

    for n in range(10):
        # Moments are counted in files, not in seconds: no machine is so fast that it is done before.
        before, more = len(finished()), rng.randrange(6)
        run = start(tmp_path / "out")
        wait_for(lambda run=run, enough=before + more: _workers(run.pid) and len(finished()) >= enough, run)
        time.sleep(rng.uniform(0, 0.05))
        # Now and then the workers are left behind, as orphans.
        (os.kill if n % 3 else os.killpg)(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        assert kept.items() <= finished().items()  # what is finished is not done again
        states = [json.loads(path.read_text()) for path in sorted(folder.glob("worker-*.json"))]
        kept = {name: when for name, when in finished().items() if _counts(name, states)}
    run = start(tmp_path / "out")
    said, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    assert re.search(r"going on from .*\.out\.partial: \d+ of 64 files, \d+ of 64000 contexts", said)
    assert content(tmp_path / "out") == undisturbed
    assert not folder.exists()


def _counts(name, states):
    worker, number = divmod(int(name[5:10]), 32)
    return worker < len(states) and number < states[worker]["files"]


def test_a_worker_goes_on_from_what_any_moment_left_on_the_disk(tmp_path, monkeypatch, tokenizer, parquet):
    monkeypatch.setattr(tokens, "ROWS_PER_BATCH", 10)
    monkeypatch.setattr(tokens, "SECONDS_BETWEEN_STATES", 0)
    monkeypatch.setattr(tokenise, "SECONDS_BETWEEN_REPORTS", -1)
    flags = {
        "chunk_documents": True,
        "num_files": 3,
        "num_samples_per_file": 245,
        "dataset_name": str(parquet),
    }
    plan = tokenise.make_plan(FLAGS | flags, tokenizer.to_str())
    folder, moments, calls = tmp_path / "run", [], itertools.count()
    tokenise.start_or_resume(folder, plan, tokenizer.to_str())

    def snapshot(_counts):
        if next(calls) % 50 == 0:
            moments.append(tmp_path / f"{len(moments)}")
            shutil.copytree(folder, moments[-1])

    assert tokenise.run_worker(folder, plan, 0, snapshot, lambda: False, None)
    assert len(moments) > 9
    last = tokens.load_states(folder, plan)
    for n, moment in enumerate(moments):
        (state,) = tokens.load_states(moment, plan)
        partial = moment / "worker-00000.partial"
        if n % 2 and state.files < 3:  # killed after a file got its name, before the state said so
            name = f"data-{state.files:05d}-of-00003.arrow"
            shutil.copy(folder / "dataset" / name, moment / "dataset")
            partial.unlink(missing_ok=True)
        elif partial.exists():  # killed in the middle of writing
            with open(partial, "ab") as handle:
                handle.write(b"half a batch of rows")
        assert tokenise.run_worker(moment, plan, 0, lambda _counts: None, lambda: False, None)
        assert content(moment / "dataset") == content(folder / "dataset")
        assert tokens.load_states(moment, plan) == last


def test_ctrl_c_keeps_what_is_written(start, tmp_path, undisturbed):
    run = start(tmp_path / "out")
    wait_for(lambda: list((tmp_path / ".out.partial" / "dataset").glob("*.arrow")), run)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all of the group
    said, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and "the same command goes on from there" in said, errors
    assert "Traceback" not in errors
    run = start(tmp_path / "out")
    assert "going on from" in run.communicate(timeout=120)[0]
    assert content(tmp_path / "out") == undisturbed


def test_ctrl_c_while_the_workers_start(start, tmp_path):
    run = start(tmp_path / "out")
    wait_for(lambda: _workers(run.pid), run)
    os.killpg(run.pid, signal.SIGINT)
    said, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and "the same command goes on from there" in said, errors
    assert "Traceback" not in errors


def test_what_a_kill_left_while_the_working_folder_was_removed(tmp_path, tokenizer, parquet):
    out, folder = tmp_path / "out", tmp_path / ".out.partial"
    write(out, tokenizer, dataset_name=parquet)
    done = content(out)
    folder.mkdir()
    state = {"files": 2, "rows": 0, "bytes": 0, "fingerprints": ["0", "1"]}
    (folder / "worker-00000.json").write_text(json.dumps(state))
    assert "complete already" in write(out, tokenizer, dataset_name=parquet)
    assert not folder.exists()
    shutil.rmtree(out)
    folder.mkdir()
    (folder / "worker-00000.json").write_text(json.dumps(state))
    write(out, tokenizer, dataset_name=parquet)
    assert content(out) == done


def test_a_worker_that_dies_ends_the_run(start, tmp_path):
    run = start(tmp_path / "out")
    wait_for(lambda: list((tmp_path / ".out.partial" / "dataset").glob("*.arrow")), run)
    os.kill(_workers(run.pid)[0], signal.SIGKILL)
    _said, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert re.search(
        r"process \d died \(signal SIGKILL\)\. What is finished is kept in .*\.out\.partial", errors
    )
    run = start(tmp_path / "out", seed=1)
    _said, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and "--seed was 0, 1 came" in errors


def test_two_runs_do_not_write_to_one_place(start, tmp_path):
    first = start(tmp_path / "out")
    wait_for(lambda: (tmp_path / ".out.partial" / "plan.json").exists(), first)
    second = start(tmp_path / "out")
    _said, errors = second.communicate(timeout=60)
    assert second.returncode == 2 and "another writes in" in errors
    assert first.wait(timeout=120) == 0


def test_a_full_disk_leaves_what_is_finished(start, tmp_path, undisturbed):
    folder = tmp_path / ".out.partial"
    run = start(tmp_path / "out")
    wait_for((folder / "worker-00000.json").exists, run)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 130
    before = {path: path.read_bytes() for path in (folder / "dataset").glob("*.arrow")}
    assert before
    (folder / "worker-00000.partial").unlink()
    (folder / "worker-00000.partial").symlink_to("/dev/full")
    run = start(tmp_path / "out")
    _said, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and "No space left on device" in errors and "goes on from there" in errors
    assert "Traceback" not in errors
    assert all(path.read_bytes() == data for path, data in before.items())
    (folder / "worker-00000.partial").unlink()
    assert start(tmp_path / "out").wait(timeout=200) == 0
    assert content(tmp_path / "out") == undisturbed


# what is refused


def test_documents_that_end_early(tmp_path, parquet, texts, tokenizer):
    long_enough = sum(len(tokenizer.encode(text, add_special_tokens=False)) >= 16 for text in texts)
    with pytest.raises(InputError) as error:
        write(tmp_path / "out", tokenizer, dataset_name=parquet, num_samples_per_file=150)
    fits = int(re.search(r"num_samples_per_file (\d+) would fit", str(error.value))[1])
    assert "300 complete contexts of 16 tokens needed" in str(error.value)
    assert f"ended after {long_enough}, of 200 documents ({long_enough} long enough)" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert fits == long_enough // 2
    write(tmp_path / "out", tokenizer, dataset_name=parquet, num_samples_per_file=fits)
    with pytest.raises(InputError, match="fewer files, --chunk_documents or a smaller --min_tokens"):
        write(tmp_path / "more", tokenizer, dataset_name=parquet, min_tokens=5000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["3", "10", "--num_processes", "2"], ["multiple", "3", "2"]),
        (["0", "10"], ["num_files", "at least 1", "0"]),
        (["2", "-5"], ["num_samples_per_file", "-5"]),
        (["2", "5", "--min_tokens", "0"], ["--min_tokens"]),
        (["2", "5", "--num_processes", "-1"], ["--num_processes"]),
        (["2", "5", "--seed", "x"], ["--seed", "x"]),
        (["2", "5", "--seed", str(2**63)], ["--seed", str(2**63)]),
        (["2"], ["num_samples_per_file"]),
    ],
)
def test_bad_flags_are_refused(arguments, words, tmp_path):
    assert_refused(run_script(SCRIPT, *arguments, cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


def test_missing_inputs_are_refused(tmp_path, smollm2):
    flags = [SCRIPT, 2, 5, "--tokenizer_name", smollm2, "--dataset_name"]
    assert_refused(run_script(*flags, "./nowhere", cwd=tmp_path), "./nowhere", "no such file or folder")
    assert_refused(run_script(*flags, "some/dataset", cwd=tmp_path), "some/dataset", "Hub")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.py").write_text("")
    assert_refused(
        run_script(*flags, tmp_path / "full", "--save_path", tmp_path / "full"),
        "--save_path",
        "something else",
    )
    assert_refused(
        run_script(SCRIPT, 2, 5, "--tokenizer_name", "./no_tokenizer", cwd=tmp_path), "no_tokenizer"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_data_that_is_broken_or_mixed_is_refused(tmp_path, tokenizer, shards):
    packed = (shards / "0.jsonl.gz").read_bytes()
    (tmp_path / "torn.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"torn\.jsonl\.gz"):
        write(tmp_path / "out", tokenizer, dataset_name=tmp_path / "torn.jsonl.gz", num_samples_per_file=100)
    shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a.py").write_text("import os")
    (tmp_path / "tree" / "fixture.jsonl").write_text('{"content": "x"}')
    with pytest.raises(InputError, match=r"source files alone, needed in .*tree, there are jsonl, py"):
        write(tmp_path / "out", tokenizer, dataset_name=tmp_path / "tree")
    with pytest.raises(InputError, match="--data_dir"):
        write(tmp_path / "out", tokenizer, dataset_name="http://host/a.parquet", data_dir=["a", "b"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenized_dataset.json").write_text("{")
    with pytest.raises(InputError, match=r"a whole tokenized_dataset\.json needed"):
        write(tmp_path / "out", tokenizer, dataset_name=shards)


def test_help_is_quick_and_says_the_defaults(tmp_path):
    start = time.monotonic()
    result = run_script(SCRIPT, "--help")
    assert result.returncode == 0 and "codellama/CodeLlama-7b-Instruct-hf" in result.stdout
    assert time.monotonic() - start < 5  # on a busy machine; alone it is a tenth of a second


# a network that breaks


class Flaky(http.server.ThreadingHTTPServer):
    """Serves a folder. The n-th GET meets faults[n]: None, a status, "drop" or "stall" half-way."""

    daemon_threads = True

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
        self._answer(None)

    def do_GET(self):
        self._answer(self.server.next_fault())

    def _answer(self, fault):
        path = self.server.folder / self.path[1:]
        status = fault if isinstance(fault, int) else 200 if path.is_file() else 404
        data, headers = path.read_bytes() if status == 200 else b"", {}
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and status == 200:
            first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
            status, headers = 206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data = data[first : last + 1]
        self.send_response(status)
        for name, value in (headers | {"Accept-Ranges": "bytes", "Content-Length": len(data)}).items():
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


@pytest.fixture(scope="session")
def shards(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("shards")
    for n in range(2):
        half = [{"content": text} for text in texts[n::2]]
        datasets.Dataset.from_list(half).to_parquet(folder / f"{n}.parquet")
        with gzip.open(folder / f"{n}.jsonl.gz", "wt") as handle:
            handle.write("\n".join(map(json.dumps, half)))
    return folder


def _remote(address):
    return sources.SourceArguments(address, None, None, "train", None, 0)


@pytest.mark.parametrize("ending", ["parquet", "jsonl.gz"])
def test_a_connection_that_breaks_loses_and_repeats_nothing(ending, serve, shards, texts, monkeypatch):
    monkeypatch.setattr(sources, "STALL_S", 0.5)
    faults = [503, 500, "drop", None, None, 503, "drop", "stall", "drop", 503, None, "stall", 503, "drop"]
    server = serve(shards, faults)
    pauses = []
    source = sources.open_patiently(_remote(f"{server.address}/{{0..1}}.{ending}"), pauses.append)
    read = [text for _at, text in sources.read_documents(source, 0, 0, 1, pauses.append, [0, 0, 0])]
    assert read in (texts[0::2] + texts[1::2], texts[1::2] + texts[0::2])
    assert server.faults == [] and len(pauses) >= 1


@pytest.mark.parametrize("ending", ["csv.gz", "jsonl.gz"])
def test_a_fault_within_a_packed_file_loses_nothing(ending, serve, tmp_path, monkeypatch):
    """fsspec fetches blocks of 5 MiB: the second one fails."""
    rng = random.Random(0)
    rows = [{"content": f"{n} {rng.randbytes(9000).hex()}"} for n in range(900)]
    data = datasets.Dataset.from_list(rows)
    with gzip.open(tmp_path / f"all.{ending}", "wb") as handle:
        data.to_csv(handle) if ending.startswith("csv") else data.to_json(handle)
    assert (tmp_path / f"all.{ending}").stat().st_size > 6 << 20
    server, pauses = serve(tmp_path), []
    source = sources.open_patiently(_remote(f"{server.address}/all.{ending}"), pauses.append)
    server.faults += [None, 503]
    read = [text for _at, text in sources.read_documents(source, 0, 0, 1, pauses.append, [0, 0, 0])]
    assert read == [row["content"] for row in rows]
    assert server.faults == [] and pauses


def test_a_dataset_streamed_over_a_broken_network_has_the_same_bytes(
    serve, shards, tmp_path, tokenizer, capfd
):
    flags = {"num_processes": 2, "num_samples_per_file": 60}
    server = serve(shards)
    address = f"{server.address}/{{0..1}}.parquet"
    write(tmp_path / "calm", tokenizer, dataset_name=address, **flags)
    server.faults += [None] * 6 + [503] * 4
    write(tmp_path / "rough", tokenizer, dataset_name=address, **flags)
    assert content(tmp_path / "rough") == content(tmp_path / "calm")
    assert server.faults == []
    with pytest.raises(InputError, match="the server answers 404"):
        write(tmp_path / "none", tokenizer, dataset_name=f"{server.address}/none.parquet")


def test_a_gated_dataset_says_which_login_is_missing(httpserver, tmp_path, smollm2):
    headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to dataset some/gated is restricted."}
    httpserver.expect_request(re.compile("/.*")).respond_with_data("", status=401, headers=headers)
    environment = {
        "HF_ENDPOINT": httpserver.url_for("")[:-1],
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
    }
    flags = ["--tokenizer_name", smollm2, "--dataset_name", "some/gated", "--save_path", tmp_path / "out"]
    assert_refused(
        run_script(SCRIPT, 2, 5, *flags, env=environment), "some/gated", "gated", "hf auth login", "HF_TOKEN"
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
