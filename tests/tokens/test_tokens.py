"""Exact ids from parts of documents; sources; the format on disk."""

import json
import random
import string
from itertools import chain

import datasets
import pytest
from conftest import write_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from sae import InputError
from sae.tokens import dataset as tokens
from sae.tokens import exact, sources

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _trained(model, trainer, text, normalizer=None, pre_tokenizer=None):
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def corpus(stdlib):
    files = sorted(stdlib.glob("*.py"))[10:30]
    words = [
        "ﬁne ½ Ⅷ １２ ｆｕｌｌ",
        "привет мир",
        "漢字かな交じり文",
        "a\u0301e\u0308 ňö",
        "🙂👩‍👩‍👧‍👦🇫🇷",
        "x\r\ny\r\n\r\n",
    ]
    return [file.read_text()[:20_000] for file in files] + words * 20


@pytest.fixture(scope="session")
def tokenizers(corpus, smollm2):
    """Small ones of each kind, trained here, and SmolLM2's."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = {"vocab_size": 900, "initial_alphabet": alphabet, "show_progress": False}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    no_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    llama3 = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), no_regex])
    # As CodeLlama's: a mark in front, no pre-tokenizer at all, words may span anything.
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Its training keeps to words, like SentencePiece's; the tokenizer itself does not.
    llama = _trained(
        models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"),
        trainers.BpeTrainer(
            vocab_size=1500,
            special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
            limit_alphabet=200,
            show_progress=False,
        ),
        [line for text in corpus for line in text.split("\n")],
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never"),
    )
    llama.normalizer, llama.pre_tokenizer = prepend, None
    llama.add_tokens(
        [AddedToken("self", normalized=False)]
    )  # what follows an added token gets a mark as well
    unigram = _trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=900, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        ),
        corpus,
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]),
        pre_tokenizers.Metaspace(),
    )
    # Tokens of several words: hardly a place where it could be cut.
    greedy = _trained(
        models.BPE(), trainers.BpeTrainer(vocab_size=2000, show_progress=False), corpus, normalizers.NFKC()
    )
    marked = _trained(
        models.BPE(), trainers.BpeTrainer(**bpe), corpus, normalizers.NFC(), byte_level
    )  # fmt: skip
    marked.add_special_tokens(["<|endoftext|>", AddedToken("<mask>", lstrip=True, rstrip=True)])
    marked.add_tokens([AddedToken("import", single_word=True), AddedToken("for x", normalized=True)])
    return {
        "smollm2": Tokenizer.from_file(f"{smollm2}/tokenizer.json"),
        "byte-level": _trained(models.BPE(), trainers.BpeTrainer(**bpe), corpus, None, byte_level),
        "llama 3": _trained(models.BPE(ignore_merges=True), trainers.BpeTrainer(**bpe), corpus, None, llama3),
        "llama": llama,
        "unigram": unigram,
        "greedy": greedy,
        "marked": marked,
        "wordpiece": _trained(
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=900, special_tokens=["[UNK]"], show_progress=False),
            corpus,
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        ),
    }


KINDS = ["smollm2", "byte-level", "llama 3", "llama", "unigram", "greedy", "marked", "wordpiece"]
PARTS = st.one_of(
    st.text(max_size=20),
    st.text(string.ascii_letters + " \n", max_size=80),
    st.sampled_from(
        ["\r\n", "    ", "\n\n\n  ", "\t", "\0", "\x1b[0m", "🙂\u200d🇫🇷", "漢字かな", "привет мир", "ﬁ ½",
         "a\u0301 \u0301", "don't", "'s 'S", "1234567", "1 2", "<|endoftext|>", " <mask> ", "import ",
         "for x", "self ", "x\u00a0y", "\u2028", "def f(x):\n    return x\n", "abcdefghij" * 100, "▁a▁ b",
         "<0x0A>", "....", "s \n s", "== "]
    ),
)  # fmt: skip
TEXTS = st.lists(st.tuples(PARTS, st.integers(1, 12)), max_size=12).map(
    lambda parts: "".join(part * times for part, times in parts)
)


def _whole(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_windows_equal_those_of_the_whole_document(kind, tokenizers, monkeypatch):
    monkeypatch.setattr(exact, "PIECE_CHARS", 40)
    tokenizer = exact.ExactTokenizer(tokenizers[kind].to_str())

    @settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(texts=st.lists(TEXTS, max_size=3), length=st.integers(1, 40))
    def check(texts, length):
        whole = [_whole(tokenizer.backend, text) for text in texts]
        tokenizer._chars_per_token = 0.5  # so that the first piece is too short
        first = [ids[:length] if len(ids) >= length else None for ids in whole]
        assert tokenizer.first_windows(texts, length) == first
        for text, ids in zip(texts, whole, strict=True):
            windows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
            assert list(tokenizer.all_windows(text, length)) == windows

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_real_and_of_odd_files(kind, tokenizers, stdlib):
    tokenizer = exact.ExactTokenizer(tokenizers[kind].to_str())
    letters = random.Random(0).choices(string.ascii_letters, k=10_000)
    texts = [file.read_bytes().decode(errors="ignore") for file in sorted(stdlib.glob("*.py"))[60:75]]
    texts += [
        "".join(letters),
        "x" * 10_000,
        "漢字" * 5_000,
        "a " * 20_000,
        texts[0].replace("\n", " ") * 20,
        "",
    ]
    whole = [_whole(tokenizer.backend, text) for text in texts]
    for length in (16, 256):
        first = [ids[:length] if len(ids) >= length else None for ids in whole]
        assert tokenizer.first_windows(texts, length) == first
        windows = [ids[i : i + length] for ids in whole for i in range(0, len(ids) - length + 1, length)]
        assert [window for text in texts for window in tokenizer.all_windows(text, length)] == windows


def test_unigram_breaks_ties_as_in_the_whole_document():
    # [a, ba] against [ab, a]: with sums that begin elsewhere, rounding decides the other way.
    scores = {"<unk>": 0.0, "▁": -2.1, "x": -1.3, "a": -2.633265554575144, "aa": -2.3738632088209077,
              "b": -1.361714742492535, "ab": -0.87675025087889, "ba": -1.6338241641058255,
              "▁a": -1.314802412351243, "▁x": -2.451395767104318}  # fmt: skip
    backend = Tokenizer(models.Unigram(list(scores.items()), 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    rng = random.Random(0)
    text = "".join(rng.choice(["aaa", "aaaaa", "ab", "ba", "x ", " ", "bab", "x x "]) for _ in range(400))
    tokenizer = exact.ExactTokenizer(backend.to_str())
    tokenizer._chars_per_token = 0.5
    whole = _whole(backend, text)
    for length in range(1, len(whole), 37):
        assert tokenizer.first_windows([text], length) == [whole[:length]]
    assert list(tokenizer.all_windows(text, 1)) == [[token] for token in whole]


def test_cuts_are_found_where_they_are_safe_and_only_there(tokenizers):
    cuts = {kind: exact.safe_cuts(tokenizer)[1] for kind, tokenizer in tokenizers.items()}
    assert cuts["smollm2"] == cuts["byte-level"] == cuts["llama 3"] == cuts["wordpiece"] == " \n\t\r"
    assert " " in cuts["llama"] and " " in cuts["unigram"]
    assert " " not in cuts["greedy"]  # it has tokens such as "f the"
    letters, white_space = exact.safe_cuts(tokenizers["marked"])
    assert "t" not in letters and "x" not in letters  # added tokens end there
    assert " " not in white_space and "\n" in white_space  # "for x" reaches over a space
    backend = Tokenizer.from_str(tokenizers["byte-level"].to_str())
    for pattern in (
        r"\w+\s?",
        r"\p{L}+(?=\s)|\s+",
        r"[^\n]+|\n",
        r"\S+\s+\S|\s+|\S",
        r"\p{L}{6}\s|\s+",
        r"import |\s+|\S+",
    ):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
        )
        assert " " not in exact.safe_cuts(backend)[1], pattern


def test_little_of_a_long_document_is_read(tokenizers):
    text = "def f(x):\n    return x\n" * 100_000
    for kind in ("smollm2", "llama", "unigram"):
        tokenizer = exact.ExactTokenizer(tokenizers[kind].to_str())
        seen = []
        batch = tokenizer.backend.encode_batch_fast

        class Backend:
            def encode_batch_fast(self, pieces, add_special_tokens, seen=seen, batch=batch):
                seen.extend(len(piece) for piece in pieces)
                return batch(pieces, add_special_tokens=add_special_tokens)

            def encode(self, text, add_special_tokens, backend=tokenizer.backend):
                return backend.encode(text, add_special_tokens=add_special_tokens)

        tokenizer.backend = Backend()
        assert len(tokenizer.first_windows([text], 256)[0]) == 256
        assert sum(seen) < 6_000, (kind, seen)


def _deal(source, processes, seed=0):
    """What each process reads."""
    deal = lambda process: sources.read_documents(source, seed, process, processes, None, [0, 0, 0])  # noqa: E731
    return [[text for _position, text in deal(process)] for process in range(processes)]


@pytest.fixture
def tree(tmp_path):
    """Twelve source files, among them one not UTF-8, one with NUL, one empty; a hidden one besides."""
    folder = tmp_path / "tree"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    for n in range(9):
        (folder / "sub" / f"{n}.py").write_bytes(f"file {n}\r\n".encode())
    (folder / "latin.py").write_bytes(b"caf\xe9")
    (folder / "binary.py").write_bytes(b"a\0b")
    (folder / "empty.py").write_bytes(b"")
    return folder


def _source(name, **arguments):
    arguments = {"data_dir": None, "dataset_config": None, "split": "train", "text_field": None} | arguments
    return sources.open_source(sources.SourceArguments(dataset_name=str(name), seed=0, **arguments))


def test_a_tree_of_source_files_is_dealt_out(tree):
    source = _source(tree)
    (alone,) = _deal(source, 1)
    assert len(alone) == 12 and "file 3\r\n" in alone and "" in alone
    assert {text.reason for text in alone if isinstance(text, sources.Skipped)} == {"not UTF-8", "holds NUL"}
    dealt = _deal(source, 5)
    assert sorted(map(repr, chain(*dealt))) == sorted(map(repr, alone))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert _deal(source, 1, seed=1)[0] != alone and _deal(source, 1) == [alone]
    assert _deal(_source(tree / "sub" / "0.py"), 2) == [["file 0\r\n"], []]


@pytest.fixture
def shards(tmp_path):
    """40 documents as parquet (4 shards), gzipped jsonl (1), csv (1), and as a dataset saved to disk."""
    import gzip

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


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl/all.jsonl.gz", "csv", "arrow"])
def test_data_files_are_dealt_out(kind, shards):
    source = _source(shards / kind)
    everything = sorted(f"document {n}" for n in range(40))
    for processes in (1, 2, 3, 7):  # more processes than shards, too
        dealt = _deal(source, processes)
        assert sorted(chain(*dealt)) == everything
        assert min(map(len, dealt)) > 0


def test_only_files_of_the_split_are_read(shards):
    (shards / "parquet" / "0.parquet").rename(shards / "parquet" / "test-0.parquet")
    (shards / "parquet" / "1.parquet").rename(shards / "parquet" / "train-1.parquet")
    assert sorted(_deal(_source(shards / "parquet"), 1)[0]) == sorted(f"document {n}" for n in range(10, 20))
    assert _deal(_source(shards / "parquet", split="test"), 1)[0] == [f"document {n}" for n in range(10)]


def test_reading_goes_on_from_every_position(shards, tree):
    for source, processes in (
        (_source(shards / "parquet"), 2),
        (_source(shards / "jsonl"), 3),
        (_source(tree), 2),
    ):
        read = lambda at: sources.read_documents(source, 0, 1, processes, None, at)  # noqa: E731, B023
        whole = list(read([0, 0, 0]))
        for n, (position, _text) in enumerate(whole):
            assert list(read(json.loads(json.dumps(position)))) == whole[n + 1 :]


def test_several_readers_alternate_until_all_have_ended():
    def reader(letter, count):
        return lambda position: ([[0, n + 1, n + 1], f"{letter}{n}"] for n in range(position[1], count))

    readers = [reader("a", 2), reader("b", 0), reader("c", 4)]
    whole = list(sources.alternate(readers, None))
    assert [text for _position, text in whole] == ["a0", "c0", "a1", "c1", "c2", "c3"]
    for n, (position, _text) in enumerate(whole):
        assert list(sources.alternate(readers, position)) == whole[n + 1 :]


def test_what_holds_no_text_is_skipped(tmp_path):
    rows = ['{"text": "good"}', '{"text": null}', '{"text": "more"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert _deal(_source(tmp_path / "a.jsonl"), 1)[0] == ["good", sources.Skipped("no text"), "more"]


def test_sources_that_cannot_be_used_are_refused(shards, tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.parquet").write_bytes(b"")
    (tmp_path / "mixed" / "b.jsonl").write_text("{}")
    (tmp_path / "none").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(InputError, match="jsonl, parquet"):
        _source(tmp_path / "mixed")
    with pytest.raises(InputError, match="no file"):
        _source(tmp_path / "none")
    with pytest.raises(InputError, match="there is none"):
        _source(shards, data_dir="nowhere")
    with pytest.raises(InputError, match=r"broken\.parquet"):
        _source(tmp_path / "broken.parquet")
    with pytest.raises(InputError, match=r"content, license, size.*'body' is none of them"):
        _source(shards / "parquet", text_field="body")
    (tmp_path / "two.jsonl").write_text('{"left": "a", "right": "b"}')
    with pytest.raises(InputError, match="left, right: none looks like text"):
        _source(tmp_path / "two.jsonl")


def test_addresses_are_spread():
    assert sources._spread("http://h/a-{08..10}.parquet") == [
        f"http://h/a-{n}.parquet" for n in ("08", "09", "10")
    ]
    assert sources._spread("http://h/a.parquet") == ["http://h/a.parquet"]


def test_a_network_that_fails_is_tried_with_growing_pauses():
    pauses, failures = [], iter([3, 1, 0])

    def read():
        left = next(failures)
        yield from ["a", "b", "c"][: 3 - left]
        if left:
            raise ConnectionResetError("reset by peer")

    assert list(sources._persistent(read, 0, pauses.append)) == ["a", "b", "c"]
    assert pauses == [1, 1]  # it had got further in between
    pauses.clear()

    def dead():
        raise TimeoutError("silence")
        yield

    with pytest.raises(ConnectionError, match="failed 9 times in a row: silence"):
        list(sources._persistent(dead, 0, pauses.append))
    assert pauses == list(sources.PAUSES) == sorted(pauses)


def test_a_dataset_that_is_none_is_refused(tmp_path, small_dataset):
    dataset, info = tokens.open_dataset(small_dataset)
    assert len(dataset) == info["rows"]
    folder = write_dataset(tmp_path / "other", [[1, 2, 3]] * 4, [0, 0, 1, 1], "some tokenizer")
    info_path = tmp_path / "other" / tokens.INFO_FILE
    info = json.loads(info_path.read_text())
    for change, words in (
        ({"rows": 5}, "5 contexts of 3"),
        ({"min_tokens": 4}, "of 3"),
        ({"vocab_size": "9"}, "vocab"),
    ):
        info_path.write_text(json.dumps(info | change))
        with pytest.raises(InputError, match=words):
            tokens.open_dataset(folder)
    for content in ("[]", "{", "{}"):
        info_path.write_text(content)
        with pytest.raises(InputError):
            tokens.open_dataset(folder)
    with pytest.raises(InputError, match="no such folder"):
        tokens.open_dataset(tmp_path / "nowhere")


def test_contexts_are_read_in_the_order_asked_for(tmp_path):
    dataset, _info = tokens.open_dataset(
        write_dataset(tmp_path / "d", [[n, n + 10, n + 20] for n in range(5)], range(5), "some tokenizer")
    )
    batches = [ids_BT.tolist() for ids_BT in tokens.read_contexts(dataset, [4, 0, 3], 2, num_tokens=2)]
    assert batches == [[[4, 14], [0, 10]], [[3, 13]]]
