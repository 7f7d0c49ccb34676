"""Token ids of documents from as little text as is needed, equal to those of tokenising them whole.

A tokenizer reads from left to right: a text's first tokens depend on little that follows them. So a prefix is
tokenised with some tokens to spare, and one twice as long. Where both begin with the same ids, so does the
document; where they differ, the longer one is compared with one twice as long again, up to the whole.
"""

SPARE_TOKENS = 32  # at the end of a prefix, where it may show that the text was cut
LEAST_CHARS = 512  # of a prefix; long words are unknown to some (WordPiece: above 100 characters)
CHUNK_CHARS = 1 << 18  # where all windows are wanted: documents of up to twice this are read at once


class ExactTokenizer:
    """A fast tokenizer (as the text of its tokenizer.json) that reads no more of a document than it must."""

    def __init__(self, tokenizer_json):
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(tokenizer_json)
        self.backend.no_truncation()
        self.backend.no_padding()
        self._chars_per_token = 4.0  # of the documents so far

    def windows(self, text, length, every=True):
        """The consecutive full windows of `length` ids, or the first alone."""
        needed = int(1.2 * self._chars_per_token * (length + SPARE_TOKENS))
        start = 0
        for ids, known in self._prefixes(text, CHUNK_CHARS if every else max(LEAST_CHARS, needed)):
            while start + length <= known:
                yield ids[start : start + length]
                if not every:
                    return
                start += length

    def _prefixes(self, text, chars):
        """(ids of a prefix, how many of them are the whole text's), of ever longer prefixes."""
        shorter = self._encode(text[:chars]) if 2 * chars < len(text) else []
        while 2 * chars < len(text):
            chars *= 2
            longer = self._encode(text[:chars])
            self._chars_per_token += 0.02 * (chars / max(1, len(longer)) - self._chars_per_token)
            known = max(0, len(shorter) - SPARE_TOKENS)
            yield longer, known if longer[:known] == shorter[:known] else 0
            shorter = longer
        ids = self._encode(text)
        yield ids, len(ids)

    def _encode(self, text):
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
