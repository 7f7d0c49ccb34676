"""The script as a user starts it: what it writes, where, and what it refuses."""

import json
import os
import re
import shutil
from pathlib import Path

import datasets
import pytest
from conftest import assert_refused, run_script
from tokenising import content, write
from tokenizers import Tokenizer, processors

from sae import InputError, artifacts
from sae.tokens import dataset as tokens
from sae.tokens import workers

SCRIPT = "generate_tokenized_dataset.py"


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, stdlib):
    """80 documents in one parquet file."""
    path = tmp_path_factory.mktemp("parquet") / "all.parquet"
    texts = [file.read_text()[:3000] for file in sorted(stdlib.glob("*.py"))[20:100]]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    return path


def test_the_script_writes_what_the_contract_says(tmp_path, smollm2, tokenizer_copy, parquet):
    flags = ["--num_processes", 2, "--min_tokens", 16, "--tokenizer_name", smollm2, "--dataset_name", parquet]
    result = run_script(SCRIPT, 4, 15, "--save_path", tmp_path / "out", *flags)
    assert result.returncode == 0, result.stderr
    assert "the text is taken from the column text" in result.stdout
    assert re.search(
        r"wrote 60 contexts of 16 tokens in 4 files to .*out in .* s \(.* tokens/s\)", result.stdout
    )
    assert "60/60" in result.stderr and "of documents long enough" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    dataset, info = tokens.open_dataset(tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.arrow"))
    assert [datasets.Dataset.from_file(str(path)).num_rows for path in files] == [15] * 4
    assert dataset.features["input_ids"] == datasets.List(datasets.Value("int32"), length=16)
    assert dataset.features["document"] == datasets.Value("int64")
    tokenizer = Tokenizer.from_file(f"{smollm2}/tokenizer.json")
    texts = datasets.load_dataset("parquet", data_files=str(parquet), split="train", cache_dir=tmp_path)[
        "text"
    ]
    for row in dataset:
        whole = tokenizer.encode(texts[row["document"]], add_special_tokens=False).ids
        assert row["input_ids"] == whole[:16]
    assert info["tokenizer_name"] == smollm2 and info["dataset_name"] == str(parquet)
    assert (info["vocab_size"], info["min_tokens"], info["rows"], info["seed"]) == (49152, 16, 60, 0)
    assert info["max_token_id"] == max(max(ids) for ids in dataset["input_ids"])
    assert info["dataset_arguments"]["text_field"] == "text"
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.is_dir()} == {0o755}
    again = {"num_files": 4, "num_samples_per_file": 15, "num_processes": 2, "tokenizer_name": smollm2}
    copy = tmp_path / "out" / "tokenizer"
    write(tmp_path / "again", copy, dataset_name=parquet, bos_token_id=1, **again)
    assert content(tmp_path / "again") == content(tmp_path / "out")
    write(tmp_path / "other", copy, dataset_name=parquet, num_samples_per_file=29)
    assert tokens.open_dataset(tmp_path / "other")[1]["fingerprint"] != info["fingerprint"]
    result = run_script(SCRIPT, 4, 15, "--save_path", tmp_path / "out", *flags)
    assert result.returncode == 0 and "complete already" in result.stdout
    with pytest.raises(InputError, match="--min_tokens was 16, 17 came"):
        write(tmp_path / "again", copy, dataset_name=parquet, **again, min_tokens=17)


def test_a_dataset_of_version_0_1_is_complete_already(tmp_path, tokenizer_copy, parquet):
    write(tmp_path / "out", tokenizer_copy, dataset_name=parquet)
    path = tmp_path / "out" / tokens.INFO_FILE
    info = json.loads(path.read_text())
    del info["add_bos"]
    path.write_text(json.dumps(info))
    for text_field in (None, ["text"]):
        flags = {"dataset_name": parquet, "text_field": text_field}
        assert "complete already" in write(tmp_path / "out", tokenizer_copy, **flags)
    with pytest.raises(InputError, match="--add_bos was None, True came"):
        write(tmp_path / "out", tokenizer_copy, dataset_name=parquet, add_bos=True)
    with pytest.raises(InputError, match="--text_field was 'text'"):
        write(tmp_path / "out", tokenizer_copy, dataset_name=parquet, text_field=["code"])


def test_a_token_for_the_beginning(tmp_path, tokenizer_copy, parquet):
    """With --add_bos each context begins with it; without, a tokenizer that adds it is no reason to do so."""
    llama, bos = tmp_path / "llama", 17
    shutil.copytree(tokenizer_copy, llama)
    backend = Tokenizer.from_file(f"{llama}/tokenizer.json")
    name = backend.id_to_token(bos)
    backend.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, bos)])
    backend.save(f"{llama}/tokenizer.json")
    config = json.loads((llama / "tokenizer_config.json").read_text()) | {"bos_token": name}
    (llama / "tokenizer_config.json").write_text(json.dumps(config))
    flags = ["--min_tokens", 16, "--tokenizer_name", llama, "--dataset_name", parquet]
    plain = run_script(SCRIPT, 1, 60, "--save_path", tmp_path / "plain", *flags)
    assert plain.returncode == 0 and f"{name} before a text: --add_bos does" in plain.stdout, plain.stderr
    added = run_script(SCRIPT, 1, 60, "--save_path", tmp_path / "bos", "--add_bos", *flags)
    assert added.returncode == 0 and "--add_bos does" not in added.stdout, added.stderr
    without, info = tokens.open_dataset(tmp_path / "plain")
    assert not info["add_bos"] and tokens.open_dataset(tmp_path / "bos")[1]["add_bos"]
    with_bos = tokens.open_dataset(tmp_path / "bos")[0]
    assert {row["document"]: row["input_ids"][1:] for row in with_bos} == {
        row["document"]: row["input_ids"][:15] for row in without
    }
    assert {ids[0] for ids in with_bos["input_ids"]} == {bos}
    one = run_script(SCRIPT, 1, 1, "--add_bos", "--min_tokens", 1, cwd=tmp_path)
    assert_refused(one, "--min_tokens", "2", "--add_bos")
    del config["bos_token"]
    (llama / "tokenizer_config.json").write_text(json.dumps(config))
    assert_refused(run_script(SCRIPT, 1, 1, "--add_bos", *flags, cwd=tmp_path), "begin-of-text token", llama)


def test_chats_and_joined_columns_have_the_ids_of_their_whole_texts(tmp_path, smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {n}? " * n},
                {"role": "assistant", "content": "x" * n},
            ],
            "prefix": f"def f{n}():\n",
            "suffix": "    return 1\n" * n,
        }
        for n in range(40)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    joined = [row["prefix"] + row["suffix"] for row in rows]
    for name, columns, texts in (("chats", ["messages"], chats), ("joined", ["prefix", "suffix"], joined)):
        flags = [
            "--min_tokens",
            24,
            "--chunk_documents",
            "--tokenizer_name",
            smollm2,
            "--save_path",
            tmp_path / name,
        ]
        result = run_script(
            SCRIPT, 1, 50, "--dataset_name", tmp_path / "a.jsonl", "--text_field", *columns, *flags
        )
        assert result.returncode == 0, result.stderr
        assert f"the text is taken from the column {' + '.join(columns)}" in result.stdout
        expected = []
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            expected += [ids[i : i + 24] for i in range(0, len(ids) - 23, 24)]
        assert tokens.open_dataset(tmp_path / name)[0]["input_ids"][:] == expected[:50]


# where it goes


@pytest.mark.parametrize("place", ["link", "link to nothing", ".", "empty", "new/deep", "mounted"])
def test_places_for_the_dataset(place, tmp_path, tokenizer_copy, parquet, monkeypatch):
    there = tmp_path / "there"
    if place != "link to nothing":
        there.mkdir()
    (tmp_path / "link").symlink_to("there")
    path = {"link": "link", "link to nothing": "link", ".": ".", "new/deep": "new/deep"}.get(place, "there")
    if place == "mounted":
        (there / "lost+found").mkdir()
    monkeypatch.chdir(there if place == "." else tmp_path)
    before = os.stat(there).st_ino if there.exists() else None
    write(path, tokenizer_copy, dataset_name=parquet)
    monkeypatch.chdir(tmp_path)
    there = there if place != "new/deep" else Path("new/deep")
    assert len(tokens.open_dataset(there)[0]) == 60
    assert {path.name for path in there.iterdir() if path.name.startswith(".")} == set()
    assert before in (None, os.stat(tmp_path / "there").st_ino)  # the folder itself is not replaced
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob(".*"))
    assert "complete already" in write(there, tokenizer_copy, dataset_name=parquet)


def test_a_move_into_a_folder_that_was_interrupted_is_finished(
    tmp_path, tokenizer_copy, parquet, monkeypatch
):
    out, moves, synced, replace, sync = tmp_path / "out", [], [], os.replace, artifacts.sync
    out.mkdir()

    def killed(source, target):
        if Path(target).parent == out:
            assert moves or set((out / ".partial" / "dataset").rglob("*")) <= set(synced)
            moves.append(Path(source).name)
            synced.clear()
            if len(moves) in (3, 7):  # of six; and then the last of the rest
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(artifacts, "sync", lambda path: synced.append(path) or sync(path))
    monkeypatch.setattr(workers.os, "replace", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write(out, tokenizer_copy, dataset_name=parquet)
        with pytest.raises(InputError, match="a tokenised dataset needed"):
            tokens.open_dataset(out)
    assert "(0 tokens/s)" in write(out, tokenizer_copy, dataset_name=parquet)
    assert moves[6] == moves[-1] == tokens.INFO_FILE and synced[-2:] == [out, tmp_path]
    write(tmp_path / "other", tokenizer_copy, dataset_name=parquet)
    assert content(out) == content(tmp_path / "other")


@pytest.mark.parametrize("place", ["file", "full", "link", "file/below"])
def test_places_where_something_is_are_refused_before_any_work(place, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.py").write_text("")
    (tmp_path / "link").symlink_to("full")
    result = run_script(
        SCRIPT, 2, 5, "--save_path", tmp_path / place, "--tokenizer_name", "no/such", cwd=tmp_path
    )
    assert_refused(result, "--save_path", "takes no files" if "/" in place else "something else", place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "link"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["a.py"]


def test_a_run_that_stops_tells_the_shell(tmp_path, tokenizer_copy, monkeypatch):
    import generate_tokenized_dataset as script
    from sae import models

    load, asked = models.load_tokenizer, []
    monkeypatch.setattr(models, "load_tokenizer", lambda *words: asked.append(words) or load(*words))
    monkeypatch.setattr("sae.tokens.write_dataset", lambda *_given: ("stopped", False))
    flags = ["--tokenizer_name", tokenizer_copy, "--dataset_name", tmp_path, "--save_path", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", [SCRIPT, "2", "5", "--trust_remote_code", *map(str, flags)])
    assert script.main() == 130
    assert asked == [(tokenizer_copy, True)]


# what is refused


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
    assert_refused(
        run_script(SCRIPT, 2, 5, "--tokenizer_name", "./no_tokenizer", cwd=tmp_path), "no_tokenizer"
    )
    assert [path.name for path in tmp_path.iterdir()] == []


def test_data_that_is_broken_or_mixed_is_refused(tmp_path, tokenizer_copy):
    import gzip

    packed = gzip.compress(b'{"content": "some words here"}\n' * 100_000)
    (tmp_path / "torn.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"torn\.jsonl\.gz"):
        write(
            tmp_path / "out",
            tokenizer_copy,
            dataset_name=tmp_path / "torn.jsonl.gz",
            num_samples_per_file=9**9,
        )
    shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    with pytest.raises(InputError, match="--data_dir"):
        write(tmp_path / "out", tokenizer_copy, dataset_name="http://host/a.parquet", data_dir=["a", "b"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenized_dataset.json").write_text("{")
    with pytest.raises(InputError, match=r"a whole tokenized_dataset\.json needed"):
        write(tmp_path / "out", tokenizer_copy, dataset_name=tmp_path)


def test_a_gated_dataset_says_which_login_is_missing(httpserver, tmp_path, smollm2):
    headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to dataset some/gated is restricted."}
    httpserver.expect_request(re.compile("/.*")).respond_with_data("", status=401, headers=headers)
    environment = {
        "HF_ENDPOINT": httpserver.url_for("")[:-1],
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
    }
    flags = ["--tokenizer_name", smollm2, "--dataset_name", "some/gated", "--save_path", tmp_path / "out"]
    result = run_script(SCRIPT, 2, 5, *flags, env=environment, fresh=True)
    assert_refused(result, "some/gated", "gated", "hf auth login", "HF_TOKEN")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_dataset_that_is_a_script_is_one_line(httpserver, tmp_path, smollm2):
    sha, script = "a" * 40, "scripted.py"
    about = {"id": "some/scripted", "sha": sha, "siblings": [{"rfilename": script}], "tags": []}
    about |= dict.fromkeys(("private", "gated", "disabled"), False)
    httpserver.expect_request(re.compile("/api/datasets/some/scripted.*")).respond_with_json(about)
    headers = {"ETag": "etag", "X-Repo-Commit": sha}
    missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
    httpserver.expect_request(re.compile(r".*\.(md|yaml)")).respond_with_data("", status=404, headers=missing)
    httpserver.expect_request(re.compile(f".*{script}")).respond_with_data("import datasets", headers=headers)
    environment = {
        "HF_ENDPOINT": httpserver.url_for("")[:-1],
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
    }
    flags = ["--tokenizer_name", smollm2, "--dataset_name", "some/scripted", "--save_path", tmp_path / "out"]
    result = run_script(SCRIPT, 2, 5, *flags, env=environment, fresh=True)
    assert_refused(result, "some/scripted", script)
