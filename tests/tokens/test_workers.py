"""The worker processes: what they write, and that nothing which happens to them changes it."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
from conftest import ROOT
from tokenising import FLAGS, content, write
from tokenizers import Tokenizer

from sae import InputError
from sae.tokens import dataset as tokens
from sae.tokens import workers

LARGE = {"num_files": 64, "num_samples_per_file": 1000, "num_processes": 2, "chunk_documents": True}
# What the script does, without the seconds that loading a tokenizer with transformers takes.
DRIVER = """
import json, sys
from sae import cli
from sae.tokens import workers
if __name__ == "__main__":
    path, flags, tokenizer = sys.argv[1:]
    with cli.Parser("").friendly_errors(), cli.stop_requested() as stopping:
        said, done = workers.write_dataset(path, json.loads(flags), tokenizer, stopping)
    print(said)
    sys.exit(0 if done else 130)
"""


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return Tokenizer.from_file(f"{smollm2}/tokenizer.json")


@pytest.fixture(scope="module")
def texts(stdlib):
    """200 documents: pieces of the standard library, some of them too short."""
    files = [file.read_text()[:3000] for file in sorted(stdlib.glob("*.py"))[20:60]]
    return [files[n % 40][100 * (n // 40) :][: 40 if n % 7 == 0 else 3000] for n in range(200)]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, texts):
    """The documents in one parquet file."""
    path = tmp_path_factory.mktemp("parquet") / "all.parquet"
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Two shards, one of 300 documents, one of 10."""
    folder = tmp_path_factory.mktemp("uneven")
    for shard, count in enumerate((300, 10)):
        rows = {"text": [f"value_{n} = {shard} + {n * n}\n" * 5 for n in range(count)]}
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{shard}.parquet")
    return folder


# what they write


def test_the_processes_take_turns(tmp_path, tokenizer_copy, parquet, texts, tokenizer):
    flags = {"dataset_name": parquet, "num_processes": 2, "num_files": 4, "num_samples_per_file": 40}
    write(tmp_path / "out", tokenizer_copy, **flags)
    dataset, info = tokens.open_dataset(tmp_path / "out")
    numbers = dataset["document"][:]
    assert len(set(numbers)) == 160  # no document twice, though both processes read one shard
    for row, number in enumerate(numbers):
        assert dataset[row]["input_ids"] == tokenizer.encode(texts[number], add_special_tokens=False).ids[:16]
    for worker in range(2):
        theirs = [number for number in numbers if number % 2 == worker]
        assert len(theirs) == 80 and theirs == sorted(theirs)
    assert max(info["documents"], info["documents_long_enough"]) <= 200
    write(tmp_path / "again", tokenizer_copy, **flags)
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_chunked_documents_keep_every_full_window(tmp_path, tokenizer_copy, parquet, texts, tokenizer):
    flags = {"dataset_name": parquet, "chunk_documents": True, "num_samples_per_file": 1100}
    write(tmp_path / "out", tokenizer_copy, **flags)
    expected, with_bos = [], []
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        expected += [(number, ids[i : i + 16]) for i in range(0, len(ids) - 15, 16)]
        with_bos += [(number, [7, *ids[i : i + 15]]) for i in range(0, len(ids) - 14, 15)]
    rows = lambda path: [(r["document"], r["input_ids"]) for r in tokens.open_dataset(path)[0]]  # noqa: E731
    assert rows(tmp_path / "out") == expected[:2200]
    info = tokens.open_dataset(tmp_path / "out")[1]  # the last document counts, though it may go on
    assert info["documents"] == expected[2199][0] + 1
    assert info["documents_long_enough"] == len({number for number, _ids in expected[:2200]})
    write(tmp_path / "bos", tokenizer_copy, bos_token_id=7, add_bos=True, **flags)
    assert rows(tmp_path / "bos") == with_bos[:2200]


def test_several_data_dirs_alternate(tmp_path, tokenizer_copy, tokenizer):
    for name in "ab":
        (tmp_path / "tree" / name).mkdir(parents=True)
        for n in range(20):
            (tmp_path / "tree" / name / f"{n}.py").write_text(f"{name} = {n}\n" * 10)
    flags = {"data_dir": ["b", "a"], "num_processes": 2, "num_samples_per_file": 9, "seed": 3}
    write(tmp_path / "out", tokenizer_copy, dataset_name=tmp_path / "tree", **flags)
    dataset, _info = tokens.open_dataset(tmp_path / "out")
    order = random.Random(3).sample(sorted(map(str, range(20))), 20)
    for worker in range(2):
        rows = [row for row in dataset if row["document"] % 2 == worker]
        assert [row["document"] for row in rows] == list(range(worker, 2 * len(rows), 2))
        lines = [tokenizer.decode(row["input_ids"]).split("\n")[0] for row in rows]
        assert lines == [f"{'ba'[n % 2]} = {order[worker::2][n // 2]}" for n in range(len(rows))]


def test_documents_without_text_are_counted_skipped_and_said(tmp_path, tokenizer_copy):
    (tmp_path / "tree").mkdir()
    for n in range(6):
        (tmp_path / "tree" / f"{n}.py").write_text("value = 1\n" * 10)
    (tmp_path / "tree" / "empty.py").write_text("")
    for n in range(3):
        (tmp_path / "tree" / f"latin{n}.py").write_bytes(b"caf\xe9 " * 50)
    (tmp_path / "tree" / "binary.py").write_bytes(b"value\0" * 50)
    # Six of eleven files will do: all are read, for the seed decides which comes last.
    flags = {"num_files": 1, "num_samples_per_file": 6, "seed": 2}
    said = write(tmp_path / "out", tokenizer_copy, dataset_name=tmp_path / "tree", **flags)
    info = json.loads((tmp_path / "out" / tokens.INFO_FILE).read_text())
    read = info["documents"] - sum(info["documents_skipped"].values())
    assert set(info["documents_skipped"]) == {"not UTF-8", "holds NUL"} and read in (6, 7)
    assert info["documents_long_enough"] == 6
    assert f"{info['documents_skipped']['not UTF-8']} skipped (not UTF-8)" in said


def test_a_document_of_300_mb(tmp_path, tokenizer_copy, tokenizer):
    with open(tmp_path / "huge.py", "w") as handle:
        for _ in range(300):
            handle.write("def function(argument):\n    return argument + 1\n" * (1_000_000 // 48))
    head = tokenizer.encode((tmp_path / "huge.py").open().read(100_000), add_special_tokens=False).ids
    for chunk, rows in ((False, 1), (True, 50)):
        flags = {"num_files": 1, "num_samples_per_file": rows, "min_tokens": 256, "chunk_documents": chunk}
        write(tmp_path / f"out{chunk}", tokenizer_copy, dataset_name=tmp_path / "huge.py", **flags)
        dataset, _info = tokens.open_dataset(tmp_path / f"out{chunk}")
        assert dataset["input_ids"][:] == [head[i : i + 256] for i in range(0, 256 * rows, 256)]


# documents that end


def test_processes_take_over_from_one_that_has_no_more_documents(tmp_path, tokenizer_copy, uneven):
    flags = {"dataset_name": uneven, "num_files": 2, "num_samples_per_file": 155}
    write(tmp_path / "two", tokenizer_copy, num_processes=2, **flags)
    write(tmp_path / "one", tokenizer_copy, **flags)
    both = [tokens.open_dataset(tmp_path / name)[0] for name in ("one", "two")]
    texts = [sorted(map(tuple, dataset["input_ids"][:])) for dataset in both]
    assert texts[0] == texts[1] and len(set(texts[0])) == 310
    assert sum(number % 2 for number in both[1]["document"][:]) in (10, 300)
    write(tmp_path / "again", tokenizer_copy, num_processes=2, **flags)
    assert content(tmp_path / "again") == content(tmp_path / "two")


def test_documents_that_do_not_suffice(tmp_path, tokenizer_copy, uneven):
    flags = {"dataset_name": uneven, "num_files": 2, "num_processes": 2}
    with pytest.raises(InputError) as error:
        write(tmp_path / "out", tokenizer_copy, num_samples_per_file=156, **flags)
    said = str(error.value)
    assert (
        "312 complete contexts of 16 tokens needed, the documents ended after 310, of 310 documents" in said
    )
    assert "(310 long enough); num_samples_per_file 155 would fit" in said
    folder = tmp_path / ".out.partial"
    assert str(folder) in said and "the same command" not in said
    (kept,) = (folder / "dataset").glob("*.arrow")
    assert datasets.Dataset.from_file(str(kept)).num_rows == 156
    with pytest.raises(InputError, match="num_samples_per_file 155"):  # again, from what is finished
        write(tmp_path / "out", tokenizer_copy, num_samples_per_file=156, **flags)
    write(tmp_path / "out", tokenizer_copy, num_samples_per_file=155, **flags)
    assert not folder.exists()
    with pytest.raises(InputError, match=r"--text_field needs data files, .* holds source files alone"):
        write(tmp_path / "code", tokenizer_copy, **flags | {"dataset_name": __file__, "text_field": ["text"]})
    with pytest.raises(InputError, match=r"fewer files, .* or a smaller --min_tokens may fit$"):
        write(tmp_path / "more", tokenizer_copy, num_samples_per_file=9, min_tokens=5000, **flags)
    assert not (tmp_path / ".more.partial").exists()  # nothing was finished


# what happens to processes


@pytest.fixture
def start(tmp_path, tokenizer_copy, stdlib):
    """Starts a run over the standard library in a process group of its own; all are ended afterwards."""
    (tmp_path / "driver.py").write_text(DRIVER)
    started = []

    def begin(path, file_bytes=None, **flags):
        flags = FLAGS | LARGE | {"dataset_name": str(stdlib)} | flags
        command = [sys.executable, tmp_path / "driver.py", path, json.dumps(flags), tokenizer_copy]
        limit = file_bytes and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)))
        run = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            preexec_fn=limit,
        )
        started.append(run)
        return run

    yield begin
    for run in started:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, stdlib, tokenizer_copy):
    """The dataset that `start` would write, written in peace."""
    path = tmp_path_factory.mktemp("undisturbed") / "out"
    write(path, tokenizer_copy, dataset_name=stdlib, **LARGE)
    return content(path)


def wait_for(condition, run, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and run.poll() is None, run.communicate()
        time.sleep(0.005)


def _workers(pid):
    """The worker processes of a run."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"multiprocessing-fork" in Path(f"/proc/{c}/cmdline").read_bytes()]


def _finished(folder):
    """When each file that is noted as finished was written."""
    progress = folder / "progress.json"
    count = len(json.loads(progress.read_text())["files"]) if progress.exists() else 0
    return {
        path.name: path.stat().st_mtime_ns for path in sorted((folder / "dataset").glob("*.arrow"))[:count]
    }


def test_killed_at_ten_random_moments_the_bytes_are_the_same(start, tmp_path, undisturbed):
    folder, rng, kept = tmp_path / ".out.partial", random.Random(0), {}
    for n in range(10):
        # Moments are counted in files, not in seconds: no machine is so fast that it is done before.
        enough = len(_finished(folder)) + rng.randrange(6)
        run = start(tmp_path / "out")
        wait_for(lambda run=run, n=enough: _workers(run.pid) and len(_finished(folder)) >= n, run)
        time.sleep(rng.uniform(0, 0.05))
        # Now and then the workers are left behind, as orphans.
        orphans = _workers(run.pid)
        (os.kill if n % 3 else os.killpg)(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        assert kept.items() <= _finished(folder).items()  # what is finished is not done again
        kept = _finished(folder)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{orphan}/cwd").exists() for orphan in orphans):
            assert time.monotonic() < deadline, "workers stay behind when their run is killed"
            time.sleep(0.01)
        assert "BrokenPipe" not in run.communicate()[1]
    run = start(tmp_path / "out")
    said, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    assert re.search(r"going on from .*\.out\.partial: \d+ of 64 files", said)
    assert content(tmp_path / "out") == undisturbed
    assert not folder.exists()


def test_going_on_after_every_file_gives_the_same_bytes(tmp_path, tokenizer_copy, uneven):
    """Whatever the rows of a file: in the middle of a document, after one process has ended, ..."""
    flags = {"dataset_name": str(uneven), "num_files": 4, "num_samples_per_file": 230, "num_processes": 2}
    flags = FLAGS | flags | {"chunk_documents": True}
    write(tmp_path / "out", tokenizer_copy, **flags)
    for files in range(5):
        place = tmp_path / f"{files}"
        count = iter(range(1000))
        folder = workers.places(place)[1]
        stopping = lambda: len(_finished(folder)) >= files and next(count) >= 0  # noqa: B023, E731
        said, done = workers.write_dataset(place, flags, tokenizer_copy, stopping)
        if not done:
            assert f"{files} of 4 files are finished and kept in {folder}" in said
            assert workers.write_dataset(place, flags, tokenizer_copy, lambda: False)[1]
        assert content(place) == content(tmp_path / "out")


def test_ctrl_c_keeps_what_is_written(start, tmp_path, undisturbed):
    run = start(tmp_path / "out")
    wait_for(lambda: list((tmp_path / ".out.partial" / "dataset").glob("*.arrow")), run)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all of the group
    said, errors = run.communicate(timeout=240)
    assert run.returncode == 130 and "the same command goes on from there" in said, errors
    assert "Traceback" not in errors
    run = start(tmp_path / "out")
    assert "going on from" in run.communicate(timeout=120)[0]
    assert content(tmp_path / "out") == undisturbed


def test_ctrl_c_while_the_workers_start(start, tmp_path):
    run = start(tmp_path / "out")
    wait_for(lambda: _workers(run.pid), run)
    os.killpg(run.pid, signal.SIGINT)
    said, errors = run.communicate(timeout=240)
    assert run.returncode == 130 and "the same command goes on from there" in said, errors
    assert "Traceback" not in errors


def test_what_a_kill_left_while_the_working_folder_was_removed(tmp_path, tokenizer_copy, parquet):
    out, folder = tmp_path / "out", tmp_path / ".out.partial"
    write(out, tokenizer_copy, dataset_name=parquet)
    done = content(out)
    (folder / "dataset").mkdir(parents=True)
    (folder / "dataset" / "data-00000-of-00002.arrow").write_text("half")
    assert "complete already" in write(out, tokenizer_copy, dataset_name=parquet)
    assert not folder.exists()
    shutil.rmtree(out)
    (folder / "dataset").mkdir(parents=True)
    (folder / "dataset" / ".data-00000-of-00002.arrow.x.partial").write_text("half")
    write(out, tokenizer_copy, dataset_name=parquet)
    assert content(out) == done


def test_a_worker_that_dies_ends_the_run(start, tmp_path):
    run = start(tmp_path / "out")
    wait_for(lambda: list((tmp_path / ".out.partial" / "dataset").glob("*.arrow")), run)
    os.kill(_workers(run.pid)[0], signal.SIGKILL)
    _said, errors = run.communicate(timeout=240)
    assert run.returncode == 2
    assert re.search(
        r"process \d died \(signal SIGKILL\)\. What is finished is kept in .*\.out\.partial", errors
    )
    run = start(tmp_path / "out", seed=1)
    _said, errors = run.communicate(timeout=240)
    assert run.returncode == 2 and "--seed was 0, 1 came" in errors


def test_what_another_version_or_other_documents_have_begun_is_refused(tmp_path, tokenizer_copy):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a.py").write_text("value = 1\n" * 10)
    flags = FLAGS | {"dataset_name": str(tmp_path / "tree")}
    said, done = workers.write_dataset(tmp_path / "out", flags, tokenizer_copy, lambda: True)
    assert not done and "0 of 2 files" in said
    shutil.copy(tmp_path / "tree" / "a.py", tmp_path / "tree" / "b.py")
    with pytest.raises(InputError, match=r"--shards was \[1\], \[2\] came"):
        write(tmp_path / "out", tokenizer_copy, dataset_name=tmp_path / "tree")
    (tmp_path / "tree" / "b.py").unlink()
    path = tmp_path / ".out.partial" / "progress.json"
    progress = json.loads(path.read_text())
    progress["plan"]["suite_version"] = "0.1.0"
    path.write_text(json.dumps(progress))
    with pytest.raises(InputError, match=r"--suite_version was '0\.1\.0', '.*' came"):
        write(tmp_path / "out", tokenizer_copy, dataset_name=tmp_path / "tree")


def test_two_runs_do_not_write_to_one_place(start, tmp_path):
    first = start(tmp_path / "out")
    wait_for(lambda: (tmp_path / ".out.partial" / "progress.json").exists(), first)
    os.killpg(first.pid, signal.SIGSTOP)  # or it might be done before
    second = start(tmp_path / "out")
    _said, errors = second.communicate(timeout=240)
    os.killpg(first.pid, signal.SIGCONT)
    assert second.returncode == 2 and "another writes in" in errors
    assert first.wait(timeout=120) == 0


def test_a_full_disk_leaves_what_is_finished(start, tmp_path, undisturbed):
    """A limit on the size of a file stands for the end of a disk: the write fails in the middle."""
    folder = tmp_path / ".out.partial"
    run = start(tmp_path / "out")
    wait_for(lambda: len(_finished(folder)) > 1, run)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=240) == 130
    before = _finished(folder)
    _said, errors = start(tmp_path / "out", file_bytes=50_000).communicate(timeout=240)
    assert "File too large" in errors and "goes on from there" in errors and "Traceback" not in errors
    assert _finished(folder) == before
    assert start(tmp_path / "out").wait(timeout=200) == 0
    assert content(tmp_path / "out") == undisturbed
