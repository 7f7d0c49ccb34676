"""Ids from parts of documents equal those of whole ones, for every kind of tokenizer."""

import random
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from sae.tokens import exact

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
    # A match may take the white space after a word, and only after some words.
    split = pre_tokenizers.Split(Regex(r"[#=]\p{L}+ ?|\p{L}+|\s+|[^\s\p{L}]+"), "isolated")
    pathological = _trained(
        models.BPE(), trainers.BpeTrainer(**bpe), corpus, None, pre_tokenizers.Sequence([split, no_regex])
    )
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
        "pathological": pathological,
        "wordpiece": _trained(
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=900, special_tokens=["[UNK]"], show_progress=False),
            corpus,
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        ),
    }


KINDS = [
    "smollm2",
    "byte-level",
    "llama 3",
    "llama",
    "unigram",
    "greedy",
    "marked",
    "wordpiece",
    "pathological",
]
PARTS = st.one_of(
    st.text(max_size=20),
    st.text(string.ascii_letters + " \n", max_size=80),
    st.sampled_from(
        ["\r\n", "    ", "\n\n\n  ", "\t", "\0", "\x1b[0m", "🙂\u200d🇫🇷", "漢字かな", "привет мир", "ﬁ ½",
         "a\u0301 \u0301", "don't", "'s 'S", "1234567", "1 2", "<|endoftext|>", " <mask> ", "import ",
         "for x", "self ", "x\u00a0y", "\u2028", "def f(x):\n    return x\n", "abcdefghij" * 100, "▁a▁ b",
         "<0x0A>", "....", "s \n s", "== ", "#word ", "=x #import  "]
    ),
)  # fmt: skip
TEXTS = st.lists(st.tuples(PARTS, st.integers(1, 12)), max_size=12).map(
    lambda parts: "".join(part * times for part, times in parts)
)


def _whole(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_windows_equal_those_of_the_whole_document(kind, tokenizers, monkeypatch):
    # Short pieces, so that documents of a few hundred characters are read in several.
    monkeypatch.setattr(exact, "CHUNK_CHARS", 120)
    monkeypatch.setattr(exact, "LEAST_CHARS", 120)
    tokenizer = exact.ExactTokenizer(tokenizers[kind].to_str())

    @settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(text=TEXTS, length=st.integers(1, 40))
    def check(text, length):
        tokenizer._chars_per_token = 0.5  # so that the first piece is too short
        ids = _whole(tokenizer.backend, text)
        windows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        assert list(tokenizer.windows(text, length, every=False)) == windows[:1]
        assert list(tokenizer.windows(text, length)) == windows

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_real_and_of_odd_files(kind, tokenizers, stdlib, monkeypatch):
    monkeypatch.setattr(exact, "CHUNK_CHARS", 5000)
    tokenizer = exact.ExactTokenizer(tokenizers[kind].to_str())
    letters = random.Random(0).choices(string.ascii_letters, k=10_000)
    texts = [file.read_bytes().decode(errors="ignore") for file in sorted(stdlib.glob("*.py"))[60:72]]
    texts += [
        "".join(letters),
        "x" * 10_000,
        "漢字" * 5_000,
        "a " * 20_000,
        " " * 30_000 + "end",
        "1234567" * 2_000,
        texts[0].replace("\n", " ") * 8,
        texts[0].replace(" ", " #") * 3,
        "",
    ]
    for text in texts:
        ids = _whole(tokenizer.backend, text)
        for length in (16, 256):
            windows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
            assert list(tokenizer.windows(text, length, every=False)) == windows[:1]
            assert list(tokenizer.windows(text, length)) == windows


def test_unigram_breaks_ties_as_in_the_whole_document(monkeypatch):
    monkeypatch.setattr(exact, "CHUNK_CHARS", 100)
    monkeypatch.setattr(exact, "LEAST_CHARS", 100)
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
        assert list(tokenizer.windows(text, length, every=False)) == [whole[:length]]
    assert list(tokenizer.windows(text, 1)) == [[token] for token in whole]


def test_a_prefix_is_not_believed_that_a_longer_one_contradicts():
    # The first word is unknown, for it has more than 100 characters: a prefix of 60 does not show it.
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "x": 1, "##x": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    text = "x" * 110 + " x" * 500
    tokenizer = exact.ExactTokenizer(backend.to_str())
    for chars in (60, 120, 1000):
        ids, known = next(tokenizer._prefixes(text, chars))
        assert known == 0 or ids[:2] == [0, 1]
    for tokenizer._chars_per_token in (4.0, 0.5):
        assert next(tokenizer.windows(text, 5, every=False)) == [0, 1, 1, 1, 1]


def test_what_a_tokenizer_cuts_and_fills_up_is_neither_here(tokenizers):
    """The tokenizer.json of many a model holds the settings of its training."""
    backend = Tokenizer.from_str(tokenizers["wordpiece"].to_str())
    ids = _whole(backend, "import os " * 9)
    backend.enable_truncation(10)
    backend.enable_padding(length=100)
    assert list(exact.ExactTokenizer(backend.to_str()).windows("import os " * 9, len(ids))) == [ids]
    assert not list(exact.ExactTokenizer(backend.to_str()).windows("import os " * 9, len(ids) + 1))


def test_little_of_a_long_document_is_read(tokenizers, monkeypatch):
    text = "def f(x):\n    return x\n" * 100_000
    for kind in ("smollm2", "llama", "unigram", "greedy", "pathological"):
        tokenizer = exact.ExactTokenizer(tokenizers[kind].to_str())
        seen, encode = [], tokenizer._encode
        monkeypatch.setattr(tokenizer, "_encode", lambda part: seen.append(len(part)) or encode(part))  # noqa: B023
        assert len(next(tokenizer.windows(text, 256, every=False))) == 256
        assert sum(seen) < 12_000, (kind, seen)
