"""Token ids of documents from as little text as is needed, equal to those of tokenising them whole.

A document is tokenised in pieces that end at *safe cuts*: between an ASCII letter and one white-space
character across which nothing in the tokenizer's pipeline can see. `safe_cuts` proves where that holds:

- added tokens, normalizer: each step must treat both sides of the cut apart;
- pre-tokenizer: each step must do so too. A regular expression without look-around (but `(?!\\S)`) qualifies
  when no match can run from a letter into the white space, which partial matching shows;
- model: either the pre-tokenizer splits at every such place, so that the cut lies between two words; or the
  model (BPE, Unigram) has no token with a letter before that white space. Then no merge crosses the cut, and
  every segmentation has a boundary there.

Whatever is not known to qualify has no safe cut: its documents are tokenised whole.
"""

import json
import string
from itertools import pairwise

LETTERS = string.ascii_letters
WHITE_SPACE = " \n\t\r"
LOCAL_NORMALIZERS = {
    "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "BertNormalizer", "Precompiled",
    "Strip", "Prepend",
}  # fmt: skip
LOCAL_PRE_TOKENIZERS = {
    "Metaspace", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer",
    "UnicodeScripts", "ByteLevel",
}  # fmt: skip
PIECE_CHARS = 1 << 15


class ExactTokenizer:
    """A fast tokenizer (as the text of its tokenizer.json) that reads no more of a document than it must."""

    def __init__(self, tokenizer_json):
        import re

        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(tokenizer_json)
        self.backend.no_truncation()
        self.backend.no_padding()
        letters, white_space = safe_cuts(self.backend)
        self._cut = re.compile(f"[{letters}](?=[{re.escape(white_space)}])") if white_space else None
        # The sums of Unigram's scores round differently when they do not begin where the document does.
        self._continues = json.loads(tokenizer_json)["model"]["type"] != "Unigram"
        self._chars_per_token = 4.0
        self._anchor = {}

    def first_windows(self, texts, length):
        """For each text its first `length` ids, or None where the whole text has fewer."""
        read = [([], 0)] * len(texts)
        unfinished = range(len(texts))
        while unfinished:
            ends = {i: self._end(texts[i], read[i], length) for i in unfinished}
            pieces = self._pieces([(texts[i], read[i][1], ends[i]) for i in unfinished])
            for i, ids in zip(unfinished, pieces, strict=True):
                read[i] = ((read[i][0] + ids) if self._continues else ids), ends[i]
            unfinished = [i for i in unfinished if len(read[i][0]) < length and read[i][1] < len(texts[i])]
        return [ids[:length] if len(ids) >= length else None for ids, _end in read]

    def all_windows(self, text, length):
        """The consecutive full windows of `length` ids of one text."""
        ids, start = [], 0
        while start < len(text):
            end = self._next_cut(text, start + PIECE_CHARS) if self._continues else len(text)
            ids += next(self._pieces([(text, start, end)]))
            for first in range(0, len(ids) - length + 1, length):
                yield ids[first : first + length]
            ids, start = ids[len(ids) - len(ids) % length :], end

    def _end(self, text, read, length):
        """Where to stop reading so that `length` ids are likely there: a safe cut or the end."""
        ids, start = read
        missing = (length - len(ids)) * self._chars_per_token
        return self._next_cut(
            text, start + int(1.1 * missing if start == 0 else 1.5 * missing + start / 4 + 16)
        )

    def _next_cut(self, text, position):
        match = self._cut.search(text, position) if self._cut and position < len(text) else None
        return match.end() if match else len(text)

    def _pieces(self, spans):
        """The ids of each text[start:end]; where reading goes on, both are safe cuts."""
        # The letter before a piece goes with it: a marker for the beginning of a text then belongs to that.
        pieces = [
            text[:end] if start == 0 or not self._continues else text[start - 1 : end]
            for text, start, end in spans
        ]
        encodings = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        for (text, start, _end), piece, encoding in zip(spans, pieces, encodings, strict=True):
            ids = encoding.ids
            if start and self._continues:
                ids = ids[self._anchor_tokens(text[start - 1]) :]
            elif len(ids) >= 64:
                self._chars_per_token += 0.02 * (len(piece) / len(ids) - self._chars_per_token)
            yield ids

    def _anchor_tokens(self, letter):
        if letter not in self._anchor:
            self._anchor[letter] = len(self.backend.encode(letter, add_special_tokens=False).ids)
        return self._anchor[letter]


def safe_cuts(backend):
    """(letters, white space) such that text may be cut after any of the one, before any of the other."""
    spec = json.loads(backend.to_str())
    model = spec["model"]
    whole = ("", "")
    if model["type"] not in ("BPE", "Unigram", "WordPiece", "WordLevel") or model.get("dropout"):
        return whole
    if not all(_normalizer_is_local(step) for step in _steps(spec["normalizer"], "normalizers")):
        return whole
    steps = _steps(spec["pre_tokenizer"], "pretokenizers")
    added = [token["content"] for token in spec["added_tokens"]]
    # An added token that ends in a letter would end a section of the text right at the cut.
    ends = {content.rstrip()[-1:].lower() for content in added}
    letters = "".join(letter for letter in LETTERS if letter.lower() not in ends)
    white_space = ""
    for space in WHITE_SPACE:
        if any(_letter_before(space, content) or _letter_before("▁", content) for content in added):
            continue
        if not all(_pre_tokenizer_is_local(step, space) for step in steps):
            continue
        if letters and _cut_is_between_tokens(backend, model, letters, space):
            white_space += space
    return (letters, white_space) if white_space else whole


def _steps(step, key):
    """A pipeline's steps in order, nested sequences opened."""
    if step is None:
        return []
    return [s for part in step[key] for s in _steps(part, key)] if step["type"] == "Sequence" else [step]


def _normalizer_is_local(step):
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String", step["pattern"].get("Regex"))
        literal = "String" in step["pattern"] or pattern == " {2,}"
        return literal and not any(char.isalpha() for char in pattern)
    return step["type"] in LOCAL_NORMALIZERS


def _pre_tokenizer_is_local(step, space):
    if step["type"] == "Split":
        if "String" in step["pattern"]:
            return not any(char.isalpha() for char in step["pattern"]["String"])
        return step["behavior"] in ("Isolated", "Removed") and _never_crosses(step["pattern"]["Regex"], space)
    if step["type"] == "CharDelimiterSplit":
        return not step["delimiter"].isalpha()
    return step["type"] in LOCAL_PRE_TOKENIZERS


def _never_crosses(pattern, space):
    """Whether no match of a regular expression can run from a letter into `space`, nor look beyond it."""
    import regex

    plain = pattern.replace(r"(?!\S)", "")
    # Words spelt out, which no text tried here might begin.
    if regex.search("[A-Za-z]{3}", regex.sub(r"\\[pP]\{\^?\w+\}", "", plain)):
        return False
    if regex.search(r"\(\?[=!<PR(]|\\[bBAzZGK1-9]|\$|&&|\[\[|\.|(?<!\[)\^", plain):
        return False
    try:
        compiled = regex.compile(plain)
    except regex.error:
        return False
    some = "aA1 \n\r'._-/é中"
    before = [
        "",
        *some,
        *(a + b for a in some for b in some),
        *(a * n for a in "aA1 '" for n in range(3, 17)),
    ]
    return not any(
        compiled.fullmatch(start + letter + space, partial=True)
        for start in before
        for letter in (LETTERS if len(start) < 2 else "aAsS")
    )


def _cut_is_between_tokens(backend, model, letters, space):
    """Whether no token of the model can hold both a letter and the `space` after it."""
    splits, spellings = True, set()
    for letter in letters:
        for after in (letter, "", " ", "\n", "1", "."):
            text = letter + space + after
            if backend.normalizer:
                text = backend.normalizer.normalize_str(text)
            words = [text]
            if backend.pre_tokenizer:
                words = [word for word, _span in backend.pre_tokenizer.pre_tokenize_str(text)]
            first = next((word for word in words if letter.lower() in word.lower()), "")
            splits = splits and first.lower().endswith(letter.lower())
            if after == letter:
                written = "".join(words)
                spellings.add(written[-2:-1] if written[-3:-2].lower() == letter.lower() else "")
    if splits:
        return True
    # These treat a word as a whole, so that a word cut in two is another matter.
    by_word = ("ignore_merges", "end_of_word_suffix", "continuing_subword_prefix")
    if model["type"] not in ("BPE", "Unigram") or any(model.get(key) for key in by_word):
        return False
    if len(spellings) != 1 or "" in spellings:
        return False
    (spelling,) = spellings
    tokens = [token for token, _score in model["vocab"]] if model["type"] == "Unigram" else model["vocab"]
    if model.get("byte_fallback") and any("<0x" in token and len(token) > 6 for token in tokens):
        return False
    return not any(_letter_before(spelling, token) for token in tokens)


def _letter_before(space, token):
    return any(before in LETTERS and after == space for before, after in pairwise(token))
