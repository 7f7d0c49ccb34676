"""sae/journal.py: what is appended is on disk, a torn end is cut off, anything else wrong is refused."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from sae import InputError, artifacts
from sae.explanations.journal import ORIGIN, Journal, check_journal, read_journal

DOCUMENTS = [{"dim": 3, "interpretation": "naïve\nline\u2028end", "score": 0.1}, {"dim": 1, "score": None}]


@pytest.fixture
def path(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        for document in DOCUMENTS:
            journal.append(document)
    return tmp_path / "j.jsonl"


def test_round_trip(path):
    assert read_journal(path) == ({3: DOCUMENTS[0], 1: DOCUMENTS[1]}, 0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == DOCUMENTS


def test_a_missing_file_is_empty(tmp_path):
    assert read_journal(tmp_path / "none.jsonl") == ({}, 0)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_run_goes_on_where_the_one_before_stopped(path):
    with Journal(path) as journal:
        journal.append({"dim": 9})
        journal.append({"dim": 1, "score": 0.5})
    documents, _ = read_journal(path)
    assert list(documents) == [3, 1, 9] and documents[1]["score"] == 0.5  # the later one counts


@pytest.mark.parametrize("tail", [b'{"dim": 4, "sco', b'{"dim": 4}', b"\0\0\0\0", b'{"dim": 4, "s\n', b"{"])
def test_a_torn_last_line_is_cut_off_once(path, tail):
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    documents, torn = read_journal(path)
    assert (list(documents), torn) == ([3, 1], len(tail))
    assert path.read_bytes() == whole + tail  # who only looks leaves the file alone
    with Journal(path) as journal:
        assert path.read_bytes() == whole
        journal.append({"dim": 9})
    documents, torn = read_journal(path)
    assert (list(documents), torn) == ([3, 1, 9], 0)


def test_a_line_that_came_before_the_lock_is_not_cut_off(path, monkeypatch):
    lock = artifacts.lock

    def last_moment(*words):
        with open(path, "ab") as other:
            other.write(b'{"dim": 7}\n{"dim"')
        lock(*words)

    monkeypatch.setattr(artifacts, "lock", last_moment)
    with Journal(path) as journal:
        journal.append({"dim": 9})
    assert list(read_journal(path)[0]) == [3, 1, 7, 9]


def test_every_cut_leaves_whole_documents(path):
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        documents, torn = read_journal(path)
        assert list(documents) == ([3] if length >= first else [])
        assert torn == (length if length < first else length - first)
        with Journal(path):
            assert path.read_bytes() == whole[: length - torn]


@pytest.mark.parametrize("line", [b"half\n", b'["dim"]\n', b'{"layer": 3}\n', b'{"dim": "3"}\n'])
def test_a_bad_line_before_the_last_is_refused_and_left_alone(path, line):
    content = line + path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"line 1 of .*j\.jsonl is no document"):
        read_journal(path)
    assert path.read_bytes() == content


def test_nan_never_reaches_the_journal(path):
    with Journal(path) as journal, pytest.raises(ValueError, match="JSON"):
        journal.append({"dim": 5, "score": float("nan")})
    assert list(read_journal(path)[0]) == [3, 1]


def test_each_line_is_whole_when_it_is_synced(path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda _handle: synced.append(path.read_bytes().splitlines()[-1]))
    monkeypatch.setattr(artifacts, "sync", synced.append)
    with Journal(path) as journal:
        assert synced.pop() == path.parent  # a new file has its name after a power cut
        journal.append({"dim": 8})
        journal.append({"dim": 9})
    assert synced == [b'{"dim": 8}', b'{"dim": 9}']


def test_two_runs_do_not_write_one_journal(path):
    with Journal(path) as _one, pytest.raises(InputError, match="another run is writing"):
        Journal(path)
    Journal(path).__exit__()
    with Journal(path) as _one:
        with open(path, "ab") as handle:
            handle.write(b'{"dim": 4')  # a line that is just being written
        before = path.read_bytes()
        with pytest.raises(InputError, match="another run is writing"):
            Journal(path)
        assert path.read_bytes() == before


def test_what_append_returned_from_outlives_kill_9(tmp_path):
    """The other process says each number after its append, and is killed in the middle of its work."""
    path = tmp_path / "j.jsonl"
    program = (
        "import itertools, sys\nfrom sae.explanations.journal import Journal\n"
        "with Journal(sys.argv[1]) as journal:\n"
        "    for dim in itertools.count():\n"
        "        journal.append({'dim': dim, 'text': 'x' * 50})\n"
        "        print(dim, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        writer.stdout.readline()
        time.sleep(0.2)
        writer.send_signal(signal.SIGKILL)
        said = [0, *map(int, writer.stdout.read().split())]
    documents, _torn = read_journal(path)
    assert set(said) <= set(documents)
    assert sorted(documents) == list(range(len(documents)))


@pytest.mark.parametrize("key", ORIGIN)
def test_a_journal_of_other_making_is_refused_and_both_are_named(key):
    origin = dict.fromkeys(ORIGIN, "ours")
    check_journal({}, origin, "here")
    check_journal({1: origin, 2: origin | {"dim": 2}}, origin, "here")
    with pytest.raises(InputError, match=r"journal here holds .*theirs instead of ours: move it away"):
        check_journal({1: origin, 2: origin | {key: "theirs"}}, origin, "here")


def test_a_journal_of_a_version_that_recorded_less_is_refused():
    origin = dict.fromkeys(ORIGIN, "ours")
    before = {key: value for key, value in origin.items() if key != "settings"}
    with pytest.raises(InputError, match=r"other settings, None instead of ours: move it away"):
        check_journal({1: before}, origin, "here")
