import json
import os
import pickle
import resource
import stat
from pathlib import Path

import pytest
import torch

from sae import InputError, artifacts
from sae.artifacts import atomic_write, check_origin, check_writable, fingerprint, load_pt, save_json, save_pt


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "artifact"
    with atomic_write(path) as handle:
        handle.write(b"old")
    with pytest.raises(OSError, match="disk"), atomic_write(path) as handle:
        handle.write(b"half of the new")
        raise OSError("disk full")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_nothing_under_the_final_name_before_the_end(tmp_path):
    with atomic_write(tmp_path / "sub" / "artifact") as handle:
        handle.write(b"x")
        assert not (tmp_path / "sub" / "artifact").exists()
    assert (tmp_path / "sub" / "artifact").stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_file_is_on_disk_before_it_has_its_name_and_its_name_is_then(tmp_path, monkeypatch):
    path, synced = tmp_path / "artifact", []

    def fsync(descriptor):
        there = os.fstat(descriptor)
        synced.append(("folder" if stat.S_ISDIR(there.st_mode) else there.st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    save_json(path, [1, 2])
    assert synced == [(path.stat().st_size, False), ("folder", True)]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_same_content_same_bytes(tmp_path):
    for name in ("one.pt", "two.pt"):
        save_pt(tmp_path / name, {"a": torch.arange(5), "b": 1.5})
    assert fingerprint(tmp_path / "one.pt") == fingerprint(tmp_path / "two.pt")
    save_pt(tmp_path / "two.pt", {"a": torch.arange(6), "b": 1.5})
    assert fingerprint(tmp_path / "one.pt") != fingerprint(tmp_path / "two.pt")


def test_a_full_disk_is_said_by_the_system(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_pt(tmp_path / "x.pt", {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_the_metrics_of_a_checkpoint_are_those_written_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert artifacts.read_metrics(path, 5) == {}
    events = [("checkpoint", 5, 1.0), ("step", 5, 2.0), ("checkpoint", 5, 3.0), ("checkpoint", 9, 4.0)]
    lines = [{"event": event, "batch": batch, "l0": l0} for event, batch, l0 in events]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert [artifacts.read_metrics(path, batch) for batch in (5, 9, 7)] == [lines[2], lines[3], {}]
    path.write_text("[1]\n")
    with pytest.raises(InputError, match=r"a JSON object per line needed in .*metrics\.jsonl"):
        artifacts.read_metrics(path, 5)


def test_load_pt_refuses_what_is_no_artifact(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(InputError, match="no such file"):
        load_pt(path, "a thing", ("a",))
    path.write_bytes(pickle.dumps({"a": os.system}))
    with pytest.raises(InputError, match="no torch file of plain tensors"):
        load_pt(path, "a thing", ("a",))
    torch.save({"a": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(InputError, match="no torch file of plain tensors"):
        load_pt(path, "a thing", ("a",))
    save_pt(path, {"a": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="truncated"):
        load_pt(path, "a thing", ("a",))
    save_pt(path, {"a": 1})
    with pytest.raises(InputError, match="lacks b"):
        load_pt(path, "a thing", ("a", "b"))
    save_pt(path, [1, 2])
    with pytest.raises(InputError, match="lacks a"):
        load_pt(path, "a thing", ("a",))


def test_check_origin_names_both():
    check_origin("samples", "aa", "aa", "x.pt")
    with pytest.raises(InputError, match=r"aa.*x\.pt.*bb"):
        check_origin("samples", "aa", "bb", "x.pt")


def test_save_json_writes_all_or_nothing(tmp_path):
    save_json(tmp_path / "a.json", {"name": "ä", "rows": [1, 2]})
    with pytest.raises(TypeError):
        save_json(tmp_path / "a.json", {"rows": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"name": "ä", "rows": [1, 2]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_check_writable_says_what_is_in_the_way_and_writes_nothing(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "new" / "deep" / "x.pt", "x.pt"):
        check_writable("--out", path, "a page", None)
    check_writable("--out", tmp_path / "file", "a page", Path.is_file)
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "x.pt", r"file takes no files \(Not a directory\)"),
        (tmp_path / "file", "a new file or a page to replace, .*file is neither"),
    ):
        for opens in (Path.is_dir, os.listdir, lambda file: load_pt(file, "a page", ())):
            with pytest.raises(InputError, match=f"--out needs .*{words}"):
                check_writable("--out", path, "a page", opens)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder here that nobody may write to")
def test_a_folder_that_nobody_may_write_to_is_refused_first():
    with pytest.raises(InputError, match=r"--out needs .*/proc/self takes no files \(.+\)"):
        check_writable("--out", "/proc/self/x.pt", "a page", None)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("here", False), ("here/x", True), ("./x", True), ("a/b/c", True), ("org/model", False),
     ("x", False), ("http://host/x/y", False)],
)  # fmt: skip
def test_what_is_no_hub_name_and_not_there(name, missing, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert artifacts.is_missing(name) is missing


def test_a_name_in_the_hubs_cache_may_begin_like_a_folder(tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    for kept in ("models--org--kept", "datasets--org--texts"):
        (tmp_path / "cache" / kept).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    names = ("org/other", "org/kept", "org/texts", "elsewhere/other")
    assert [artifacts.is_missing(name) for name in names] == [True, False, False, False]
