"""Which documents a source has: layouts on disk, splits, columns, links; and how they are dealt out."""

import gzip
import json
import shutil
from itertools import chain

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae import InputError
from sae.tokens import sources
from sae.tokens.datafiles import Skipped


def open_source(name, **arguments):
    return sources.open_source(str(name), **arguments)


def deal(source, processes, seed=0):
    """What each process reads."""
    one = lambda process: sources.read_documents([source], seed, process, processes)  # noqa: E731
    return [[text for _turns, text in one(process)] for process in range(processes)]


def read(name, **arguments):
    return deal(open_source(name, **arguments), 1)[0]


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def dataset_of(*texts):
    return datasets.Dataset.from_list([{"content": text} for text in texts])


@pytest.fixture
def tree(tmp_path):
    """Twelve source files, among them one not UTF-8, one with NUL, one empty; a hidden one besides."""
    folder = tmp_path / "tree"
    (folder / "sub").mkdir(parents=True)
    for unread in (".git", "__pycache__"):
        (folder / unread).mkdir()
        (folder / unread / "config").write_text("hidden")
    for n in range(9):
        (folder / "sub" / f"{n}.py").write_bytes(f"file {n}\r\n".encode())
    (folder / "latin.py").write_bytes(b"caf\xe9")
    (folder / "binary.py").write_bytes(b"a\0b")
    (folder / "empty.py").write_bytes(b"")
    return folder


@pytest.fixture
def shards(tmp_path):
    """40 documents as parquet (4 shards), gzipped jsonl (1), csv (1), and as a dataset saved to disk."""
    rows = [{"content": f"document {n}", "license": "mit", "size": n} for n in range(40)]
    for kind in ("parquet", "jsonl", "csv"):
        (tmp_path / kind).mkdir()
    for n in range(4):
        datasets.Dataset.from_list(rows[10 * n : 10 * n + 10]).to_parquet(
            tmp_path / "parquet" / f"{n}.parquet"
        )
    with gzip.open(tmp_path / "jsonl" / "all.jsonl.gz", "wt") as handle:
        handle.write("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "csv" / "all.csv")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "arrow", num_shards=2)
    return tmp_path


# dealing out


def test_a_tree_of_source_files_is_dealt_out(tree):
    source = open_source(tree)
    (alone,) = deal(source, 1)
    assert len(alone) == 12 and "file 3\r\n" in alone and "" in alone
    assert {text.reason for text in alone if isinstance(text, Skipped)} == {"not UTF-8", "holds NUL"}
    dealt = deal(source, 5)
    assert sorted(map(repr, chain(*dealt))) == sorted(map(repr, alone))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert deal(source, 1, seed=1)[0] != alone and deal(source, 1) == [alone]
    assert deal(open_source(tree / "sub" / "0.py"), 2) == [["file 0\r\n"], []]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl/all.jsonl.gz", "csv", "arrow"])
def test_data_files_are_dealt_out(kind, shards):
    source = open_source(shards / kind)
    everything = sorted(f"document {n}" for n in range(40))
    for processes in (1, 2, 3, 7):  # more processes than shards, too
        dealt = deal(source, processes)
        assert sorted(chain(*dealt)) == everything
        assert min(map(len, dealt)) > 0


def test_reading_goes_on_from_every_position(shards, tree):
    for opened, processes in (
        ([open_source(shards / "parquet")], 2),
        ([open_source(shards / "jsonl")], 3),
        ([open_source(shards / "parquet")], 7),
        ([open_source(tree), open_source(shards / "csv"), open_source(shards / "arrow")], 2),
    ):
        whole = list(sources.read_documents(opened, 0, 1, processes))
        for n, (turns, _text) in enumerate(whole):
            going_on = sources.read_documents(opened, 0, 1, processes, json.loads(json.dumps(turns)))
            assert list(going_on) == whole[n + 1 :]


def test_several_sources_alternate_until_all_have_ended(tmp_path):
    for name, count in (("a", 2), ("c", 4)):
        write_lines(tmp_path / f"{name}.jsonl", *({"text": f"{name} {n}"} for n in range(count)))
    write_lines(tmp_path / "b" / "empty.py", "")
    opened = [open_source(tmp_path / name) for name in ("a.jsonl", "b", "c.jsonl")]
    opened[1] = opened[1]._replace(paths=[])
    texts = [text for _turns, text in sources.read_documents(opened, 0, 0, 1)]
    assert texts == ["a 0", "c 0", "a 1", "c 1", "c 2", "c 3"]


# which column


@pytest.mark.parametrize("empty", [None, ""])
def test_the_column_is_found_though_its_first_rows_are_empty(empty, tmp_path):
    rows = [{"id": f"a{n}", "content": empty if n < 30 else f"text {n}"} for n in range(40)]
    path = write_lines(tmp_path / "a.jsonl", *rows)
    assert open_source(path).columns == ["content"]
    assert read(path)[30:] == [f"text {n}" for n in range(30, 40)]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "a.csv", index=False)
    assert open_source(tmp_path / "a.csv").columns == ["content"]
    # Only the names are there to decide.
    assert open_source(write_lines(tmp_path / "b.jsonl", *rows[:30])).columns == ["content"]
    # Among those with usual names, one that holds something.
    rows = [{"content": None, "text": "words here"}] * 3
    assert open_source(write_lines(tmp_path / "c.jsonl", *rows)).columns == ["text"]


def test_an_identifier_is_not_taken_for_text(tmp_path):
    for rows in (
        [{"id": "a1", "snippet": None}],
        [{"id": "a1", "size": 3}],
        [{"left": "some words", "right": "other words"}],
        [{"snippet": None, "title": "some words"}],
        [{"content": [1, 2], "title": None}],
    ):
        path = write_lines(tmp_path / "a.jsonl", *rows)
        with pytest.raises(InputError, match=f"{', '.join(rows[0])}: none looks like text"):
            open_source(path)
    assert open_source(write_lines(tmp_path / "a.jsonl", {"id": "a1", "snippet": "x = 1"})).columns == [
        "snippet"
    ]
    assert open_source(write_lines(tmp_path / "a.jsonl", {"snippet": "x=1"})).columns == ["snippet"]


def test_columns_asked_for_are_checked_and_joined(shards, tmp_path):
    with pytest.raises(InputError, match=r"content, license, size.*'body' is none of them"):
        open_source(shards / "parquet", text_field=["content", "body"])
    with pytest.raises(InputError, match="'size' holds no text"):
        open_source(shards / "parquet", text_field=["size"])
    rows = [
        {"prefix": "a\n", "middle": "b", "suffix": None},
        {"prefix": None, "middle": None},
        {"prefix": "x"},
        {"prefix": "x", "middle": 3},
        {"prefix": ""},
    ]
    path = write_lines(tmp_path / "a.jsonl", *rows)
    no_text = Skipped("no text")
    assert read(path, text_field=["prefix", "middle", "suffix"]) == ["a\nb", no_text, "x", no_text, ""]
    assert read(path, text_field=["middle", "prefix"]) == ["ba\n", no_text, "x", no_text, ""]


def test_only_the_column_of_the_text_is_read(tmp_path):
    """Others may be added, change their type late, or hold images that do not open."""
    folder = tmp_path / "drift"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a b"]}), folder / "0.parquet")
    pq.write_table(pa.table({"stars": [1], "text": ["c"]}), folder / "1.parquet")
    image = pa.array([{"bytes": b"no image", "path": "x.png"}])
    pq.write_table(pa.table({"image": image, "text": ["d"], "stars": ["many"]}), folder / "2.parquet")
    assert sorted(read(folder)) == ["a b", "c", "d"]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": None}], "text": ["e"]}, features=features
    )
    broken.save_to_disk(tmp_path / "images")
    assert read(tmp_path / "images") == ["e"]
    rows = [{"text": f"row {n}", "note": None if n < 3000 else "late"} for n in range(3001)]
    assert len(read(write_lines(tmp_path / "late.jsonl", *rows, {"text": "x", "note": {"a": [1]}}))) == 3002


def test_messages_go_through_the_chat_template(tmp_path, tokenizer_copy):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_copy)
    chats = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x = 1"}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}],
    ]
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": ["1 a", "2 b"], "messages": chats}), parquet)
    expected = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in chats]
    assert "<|im_start|>user\nhi<|im_end|>" in expected[0]
    assert read(parquet, text_field=["messages"], tokenizer=tokenizer_copy) == expected
    assert read(parquet, text_field=["messages", "id"], tokenizer=tokenizer_copy) == [
        expected[0] + "1 a",
        expected[1] + "2 b",
    ]
    shared = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x = 1"}]}
    spoken = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "who?"}]
    others = ({"conversations": each} for each in (spoken, [1, 2], "plain"))
    lines = write_lines(tmp_path / "a.jsonl", shared, *others)
    refused = Skipped("refused by the chat template")
    assert read(lines, text_field=["conversations"], tokenizer=tokenizer_copy) == [
        *expected,
        refused,
        "plain",
    ]
    plain = tmp_path / "plain"
    shutil.copytree(tokenizer_copy, plain)
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="a tokenizer with a chat template"):
        open_source(parquet, text_field=["messages"], tokenizer=plain)


# layouts


def test_caches_beside_a_saved_dataset_are_not_read(tmp_path):
    dataset_of("a b", "c").save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    loaded.map(lambda row: {"content": row["content"] * 2}, load_from_cache_file=False)
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    assert read(tmp_path / "saved") == ["a b", "c"]
    both = datasets.DatasetDict({"train": dataset_of("x y"), "test": dataset_of("z")})
    both.save_to_disk(tmp_path / "both")
    shutil.copy(next((tmp_path / "saved").glob("cache-*.arrow")), tmp_path / "both" / "train")
    assert read(tmp_path / "both") == ["x y"]


def test_only_files_of_the_split_are_read(shards, tmp_path):
    folder = shards / "parquet"
    (folder / "Train").mkdir()
    (folder / "0.parquet").rename(folder / "Train" / "TEST-0.parquet")  # the last word says it
    (folder / "3.parquet").rename(folder / "contest.parquet")
    assert len(read(folder)) == 30  # files that name no split are for training
    (folder / "1.parquet").rename(folder / "train-1.parquet")
    (folder / "dev").mkdir()
    (folder / "2.parquet").rename(folder / "dev" / "0.parquet")
    assert read(folder, split="test") == [f"document {n}" for n in range(10)]
    assert read(folder, split="validation") == [f"document {n}" for n in range(20, 30)]
    assert sorted(read(folder, data_dir="dev")) == sorted(read(folder, split="dev"))
    both = datasets.DatasetDict(
        {"train": dataset_of("x y"), "held_out": dataset_of("z"), "Extra": dataset_of("w")}
    )
    both.save_to_disk(tmp_path / "both")
    assert [read(tmp_path / "both", split=split) for split in ("train", "held_out", "Extra")] == [
        ["x y"], ["z"], ["w"],
    ]  # fmt: skip
    assert read(tmp_path / "both" / "held_out") == ["z"]


@pytest.mark.parametrize("split", ["validation", "train[:50%]", "train+test", "all"])
def test_a_split_that_is_not_there_is_refused(split, tmp_path, tree):
    datasets.DatasetDict({"train": dataset_of("x y"), "test": dataset_of("z")}).save_to_disk(
        tmp_path / "both"
    )
    words = r"without a slice" if "[" in split or "+" in split else rf"one of test, train .*'{split}'"
    with pytest.raises(InputError, match=words):
        open_source(tmp_path / "both", split=split)
    with pytest.raises(InputError, match="--split"):
        open_source(tree, split=split)
    with pytest.raises(InputError, match="--split"):
        open_source(write_lines(tmp_path / "a.jsonl", {"text": "a b"}), split=split)
    datasets.DatasetDict({"test": dataset_of("z")}).save_to_disk(tmp_path / "one")
    with pytest.raises(InputError, match=r"one of test .*'train'"):
        open_source(tmp_path / "one")
    assert read(tmp_path / "one", split="test") == ["z"]


@pytest.mark.parametrize("name", ["[x]", "a*b?", "{1..2}", "100%", "a b#c", "~x", "hf::y", "ä漢"])
def test_folders_may_have_any_name(name, tmp_path):
    folder = tmp_path / name
    write_lines(folder / name / f"{name}.jsonl", {"text": "a b"})
    (tmp_path / f"{name}.tree").mkdir()
    (tmp_path / f"{name}.tree" / f"{name}.py").write_text("x")
    dataset_of("c d").save_to_disk(tmp_path / "saved")
    (tmp_path / "saved").rename(folder / "saved")
    assert read(folder / name) == read(folder, data_dir=name) == ["a b"]
    assert read(folder / "saved") == ["c d"]
    assert read(tmp_path / f"{name}.tree") == ["x"]


def test_links_are_followed_once(tmp_path, capsys):
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "a.py").write_text("a")
    (outside / "up").symlink_to(outside)
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "b.py").write_text("b")
    (folder / "first").symlink_to(outside)
    (folder / "second").symlink_to(outside / "deep")
    (folder / "again.py").symlink_to(folder / "b.py")
    (folder / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        assert sorted(read(path)) == ["a", "b"]
        said = capsys.readouterr().out.splitlines()  # the first three of four
        assert [line.rsplit("/", 1)[1] for line in said] == ["b.py", "up", "gone.py"]
    (tmp_path / "single.py").symlink_to(folder / "b.py")
    assert read(tmp_path / "single.py") == ["b"]


def test_the_folder_that_the_hubs_client_keeps(tmp_path):
    cache = tmp_path / "datasets--some--code"
    blob, old = cache / "blobs" / "1f", cache / "snapshots" / "0a"
    write_lines(blob, {"text": "new one"})
    write_lines(old / "data.jsonl", {"text": "old one"})
    snapshot = cache / "snapshots" / "ab"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "train.jsonl").symlink_to("../../../blobs/1f")
    for name in ("README.md", "CITATION.cff", "LICENSE", ".gitattributes", "logo.png", "dataset_infos.json"):
        (snapshot / name).write_text("about")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("ab")
    assert read(cache) == read(snapshot) == read(cache, data_dir="data") == ["new one"]
    (cache / "refs" / "main").unlink()
    assert read(cache) == ["new one"]


def test_other_files_beside_data(tmp_path):
    (tmp_path / "tsv").mkdir()
    (tmp_path / "tsv" / "a.tsv").write_text('text\tn\n"a ""b""\n2"\t1\nc, d\t2\n')
    for name in ("README.md", "LICENSE.txt", "CITATION.cff"):
        (tmp_path / "tsv" / name).write_text("about")
    assert read(tmp_path / "tsv") == ['a "b"\n2', "c, d"]
    mixed = tmp_path / "mixed"
    write_lines(mixed / "a.jsonl", {"text": "a b"})
    write_lines(mixed / "b.ndjson", {"text": "c"})
    write_lines(mixed / "c.json", {"text": "d"})
    assert sorted(read(mixed)) == ["a b", "c", "d"]
    (mixed / "a.py").write_text("x")
    with pytest.raises(InputError, match=r"data files of one kind, or source files alone, .* json, jsonl"):
        open_source(mixed)
    # Another program's files may have the names of descriptions.
    (mixed / "a.py").unlink()
    for name, text in (
        ("state.json", '{"epoch": 3}'),
        ("dataset_dict.json", "[]"),
        ("dataset_info.json", "{"),
    ):
        (mixed / name).write_text(text)
    assert sorted(read(mixed)) == ["a b", "c", "d"]
    # A tree of source files may hold json and csv files, which are documents there.
    code = tmp_path / "code"
    write_lines(code / "package.json", {"name": "x"})
    (code / "a.py").write_text("x = 1")
    (code / "README.md").write_text("# x")
    assert sorted(read(code)) == ["# x", "x = 1", '{"name": "x"}']


def test_sources_that_cannot_be_used_are_refused(shards, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    (tmp_path / "a.pt").write_bytes(b"PK\xff")
    write_lines(tmp_path / "empty.jsonl", "")
    write_lines(
        tmp_path / "no.jsonl", "version https://git-lfs.github.com/spec/v1", "oid sha256:12", "size 5"
    )
    for name, words in (
        ("none", "no file"), ("broken.parquet", r"broken\.parquet"), ("empty.jsonl", "holds none"),
        ("no.jsonl", "holds none"), ("a.pt", r"--dataset_name needs text .*a\.pt is none: not UTF-8"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            open_source(tmp_path / name)
    with pytest.raises(InputError, match="there is none"):
        open_source(shards, data_dir="nowhere")
    with pytest.raises(InputError, match="--dataset_config is for hub datasets"):
        open_source(shards / "csv", dataset_config="en")
    for flag in ("data_dir", "dataset_config"):
        with pytest.raises(InputError, match="are not for addresses"):
            open_source("http://host/a.jsonl", **{flag: "en"})
    with pytest.raises(InputError, match="parquet, arrow"):
        open_source("http://host/a.zip")


def test_addresses_are_spread():
    spread = sources._addresses
    assert spread("http://h/a-{08..10}.parquet") == [f"http://h/a-{n}.parquet" for n in ("08", "09", "10")]
    assert spread("http://h/a.jsonl.zst?download=true") == ["http://h/a.jsonl.zst?download=true"]


def test_the_files_of_a_hub_dataset_are_those_of_its_split_in_the_folder(tmp_path):
    """The hub's library reads a folder as it does what the hub lists."""
    for name in ("en/train.jsonl", "en/test.jsonl", "de/test.jsonl"):
        write_lines(tmp_path / name, {"text": name})
    found = sources._hub_files(str(tmp_path), "en", None, "test")
    assert found == [str(tmp_path / "en" / "test.jsonl")]
    with pytest.raises(InputError, match=r"--split needs one of .*, which has train, test, got 'dev'"):
        sources._hub_files(str(tmp_path), "en", None, "dev")
