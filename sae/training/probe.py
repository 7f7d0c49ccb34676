"""How well single features tell the token classes of Python apart: a probe of meaning that needs no LLM.

Dims: T tokens, C classes and one more for none, F features.
"""

import io
import itertools
import keyword
import tokenize

import torch

CLASSES = ("keyword", "name", "number", "string", "comment", "operator")
FEWEST = 10  # tokens of a class in each half, for a score that says something
_OF_TYPE = {tokenize.NUMBER: "number", tokenize.COMMENT: "comment", tokenize.OP: "operator"}
_STRINGS = ("STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
_OF_TYPE |= {getattr(tokenize, name): "string" for name in _STRINGS if hasattr(tokenize, name)}


def token_classes(tokenizer, ids):
    """The class of each token [T]: that of its first character but white space, -1 for none.

    ids: a document from its beginning on. What comes after a place that is no Python has no class.
    """
    # A token's text is what it adds to the one before: alone, some tokenizers drop the space before it.
    alone = tokenizer.batch_decode([[one] for one in ids])
    pairs = tokenizer.batch_decode([list(pair) for pair in itertools.pairwise(ids)])
    texts = alone[:1] + [pair[len(first) :] for pair, first in zip(pairs, alone, strict=False)]
    of_place = _places("".join(texts))
    ends = itertools.accumulate(len(text) for text in texts)
    # From its first visible character: `lstrip` says how many are before its end.
    return torch.tensor(
        [of_place.get(end - len(text.lstrip()), -1) if text.strip() else -1
         for end, text in zip(ends, texts, strict=True)]
    )  # fmt: skip


def _places(text):
    """Class of every character of a source text that lies in a token: {place: number of the class}."""
    starts = [0, *itertools.accumulate(map(len, io.StringIO(text)))]  # `splitlines` also splits at \f
    found = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            name = "keyword" if keyword.iskeyword(token.string) else _OF_TYPE.get(token.type)
            name = name or ("name" if token.type == tokenize.NAME else None)
            if name:
                first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
                found |= dict.fromkeys(range(first, last), CLASSES.index(name))
    except (tokenize.TokenError, SyntaxError, IndexError):
        pass
    return found


def probe_f1(fired_2CF, tokens_2C):
    """Mean over the classes of the F1 of the best feature: chosen on the first half, scored on the second.

    fired_2CF: on how many tokens of each class (the last: of none) a feature fired; tokens_2C: how many there
    were. None where no class has FEWEST tokens in both halves.
    """
    f1_2CF = 2 * fired_2CF / (fired_2CF.sum(1, keepdim=True) + tokens_2C[..., None]).clamp_min(1)
    known = [c for c in range(len(CLASSES)) if tokens_2C[:, c].min() >= FEWEST]
    scores = [float(f1_2CF[1, c, f1_2CF[0, c].argmax()]) for c in known]
    return sum(scores) / len(scores) if scores else None
