"""Simulated activations of contexts from an explanation alone: by tokens, by lines, by both.

Dims: C contexts, T tokens of one, d the ten digits, V the interpreter's vocabulary, U distinct tokens, S ways
to spell one.

**Token reading.** One short pass asks the LLM for a token on which the feature fires; how much more likely
each token is than under a neutral explanation is its simulated activation, in every context at once. A token
is read by its first interpreter token; punctuation, digits and white space also by the characters in it and
by their English names, for `",` is how a comma looks in the vocabulary and `comma` how an LLM answers. What
an explanation names literally ("the word self", "the token `.`") fires there whatever the LLM makes of it.

**The grammar.** A token reading sees no context. What an explanation says about neighbours is taken from its
words: parts between semicolons; in each, WHAT [after | following | before | preceding] NEIGHBOUR, WHAT in a
line after NEIGHBOUR, WHAT in comments (a line after # or //). WHAT and NEIGHBOUR are read as tokens, and the
part holds where both do. Words such as "the name" or "what" stand for any token; of a list, "the words A, B
and C", each is read. That is a rule, not the LLM's understanding of the sentence.
"""

import re
from functools import partial
from typing import NamedTuple

import torch

from sae.explanations import prompts
from sae.explanations.candidates import SPELT, Tokens

STEEPNESS, THRESHOLD = 2.0, 4.0  # of `contrasted`; benchmarks/simulation.py makes the tables behind these
TOKEN_THRESHOLD, FLOOR = 5.0, 1e-5  # of the token reading, and the least probability it compares with
SEES = 0.1  # what the token reading gives some token at least where it is right
NAMES = {
    ",": "comma", ".": "dot period", ":": "colon", ";": "semicolon", "'": "quote apostrophe", '"': "quote",
    "`": "backtick", "_": "underscore", "#": "hash comment", "(": "opening open parenthesis bracket",
    ")": "closing close parenthesis bracket", "[": "opening open square bracket",
    "]": "closing close square bracket", "{": "opening open curly brace bracket",
    "}": "closing close curly brace bracket", "=": "equals", "+": "plus", "-": "minus dash hyphen",
    "*": "star asterisk", "/": "slash", "\\": "backslash", "<": "less", ">": "greater", "%": "percent",
    "&": "ampersand", "|": "pipe", "^": "caret", "~": "tilde", "@": "at decorator", "!": "exclamation",
    "?": "question", "$": "dollar", "\n": "newline new", "\t": "tab", " ": "space whitespace indentation",
} | dict.fromkeys("0123456789", "digit number")  # fmt: skip
NOUN = (
    "(?:tokens?|things?|words?|names?|identifiers?|variables?|attributes?|values?|expressions?|arguments?|"
    "text)"
)
# Stands for any token; then words such as "that comes directly".
ANY = re.compile(
    rf"(what(ever)?|anything|((an?|the|any|all|each|every)\s+)?((first|next|variable|function|class|module)\s+)*{NOUN})?"
    r"(\s*\b(that|which|comes?|stands?|is|are|found|directly|immediately|right|just))*",
    re.IGNORECASE,
)
NAMED = re.compile(r"\b(words?|names?|identifiers?|variables?|attributes?)\b", re.IGNORECASE)
BESIDE = re.compile(
    r"(?P<what>.*?)(^|\s)(?P<side>in a line after|after|following|follows?|before|preceding)"
    r"\s+(?!and\b|or\b)(?P<neighbour>.+)",
    re.IGNORECASE,
)
IN_LINE = "in a line after"
SIDES = {IN_LINE: IN_LINE, "before": "before", "preceding": "before"}  # all others: after
COMMENT = re.compile(r"(?P<what>.*?)\s+(in|of|inside|within)\s+(an?\s+|the\s+)?comments?\b.*", re.IGNORECASE)
COMMENT_SIGNS = ("the token `#`", "the token `//`")
CODE, HIDDEN, SUCH_AS = re.compile(r"`[^`]*`"), "\ue000", " such as "
KIND = re.compile(r"^((an?|the)\s+)?((key)?words?|tokens?|names?)\s+", re.IGNORECASE)
LIST = re.compile(r",?\s+(?:and|or)\s+|,\s+")
LITERAL = re.compile(r"the (?:word (\w+)|token `(.+)`)")
WHITE_SPACE = {name: typed for typed, name in SPELT.items()}


class Read(NamedTuple):
    """A part of an explanation: phrases to read as tokens, the best of which counts; none for any token."""

    what: tuple
    side: str | None = None
    neighbours: tuple = ()  # the same of each token beside it, the nearest last
    named: bool = False  # any token that holds a letter

    def phrases(self):
        return [phrase for some in (self.what, *self.neighbours) for phrase in some]


def parsed(explanation):
    """The Reads of an explanation; what it says in backticks is never taken for grammar."""
    code = iter(CODE.findall(explanation))
    plain = CODE.sub(HIDDEN, explanation)
    reads, parts = [], list(filter(None, map(str.strip, plain.split(";"))))
    for part in parts or [plain.strip()]:  # semicolons alone are what it speaks of
        side, what, neighbour = None, part, ""
        if found := BESIDE.fullmatch(part):
            side = SIDES.get(found["side"].lower(), "after")
            what, neighbour = found["what"].strip(), found["neighbour"]
        elif found := COMMENT.fullmatch(part):
            side, what = IN_LINE, found["what"].strip()
        anything = bool(side and ANY.fullmatch(what))
        named = anything and bool(NAMED.search(what))
        what, neighbour = (re.sub(HIDDEN, lambda _: next(code), text) for text in (what, neighbour))
        beside = _sequence(neighbour, side) if neighbour else (COMMENT_SIGNS,) if side else ()
        reads.append(Read(() if anything else _phrases(what), side, beside, named))
    return reads


def _phrases(text):
    """What to read as tokens: of a list of tokens each, of anything else the whole."""
    general, _, items = text.rpartition(SUCH_AS) if SUCH_AS in text else ("", "", KIND.sub("", text))
    items = [item.strip("`\"'") for item in LIST.split(items)]
    if not all(item and " " not in item for item in items):
        return (text,)
    general = general.rstrip(", ")
    return (*([general] if general else []), *(_literally(item) for item in items))


def _literally(token):
    return f"the word {token}" if token.isalnum() else f"the token `{token}`"


def named(phrase):
    """The token, as `typed`, that a phrase names literally, or None."""
    found = LITERAL.fullmatch(phrase)
    return found[1] or found[2] if found else WHITE_SPACE.get(phrase)


def _sequence(neighbour, side):
    """The phrases of each token beside, the nearest last: of code such as self. all its tokens, else one."""
    text = KIND.sub("", neighbour).strip("`")
    pieces = re.findall(r"\w+|[^\w\s]", text)
    if " " in text or len(pieces) < 2 or side == IN_LINE or not any(map(str.isalnum, pieces)):
        return (_phrases(neighbour),)
    return tuple((_literally(piece),) for piece in (pieces[::-1] if side == "before" else pieces))


def contrasted(log_p_CTd, neutral_CTd=None):
    """Simulated activations [C, T] from the digits' log probabilities; their scale means nothing.

    Without `neutral`: the expected digit (Bills et al.). With it: how much more the explanation makes a
    non-zero digit likely than the neutral one does, so that a token's own pull cancels.
    """
    if neutral_CTd is None:
        return log_p_CTd.exp() @ torch.arange(10.0)
    odds_CT = _log_odds(log_p_CTd) - _log_odds(neutral_CTd)
    return torch.sigmoid(STEEPNESS * odds_CT - THRESHOLD)


def _log_odds(log_p_CTd):
    """Of a non-zero digit."""
    return log_p_CTd[..., 1:].logsumexp(-1) - log_p_CTd[..., 0]


class Simulator:
    """Simulations by an Interpreter. `way`: contrastive (tokens, or lines where these see nothing), tokens,
    or expected (lines, the paper's expected value).

    `progress(n)` is called whenever n texts have been read.
    """

    def __init__(self, interpreter, way, batch_size=16, progress=None):
        self.interpreter, self.way = interpreter, way
        self._batch_size, self._progress = batch_size, progress
        self._neutral, self._phrases, self._spelt, self._base = {}, {}, {}, None

    def __call__(self, explanation, contexts, lines=True):
        """Simulated activations [C, T]. Without `lines`, tokens are read alone unless the way is expected."""
        if self.way == "expected":
            return contrasted(self._lines(explanation, contexts))
        simulation_CT = self.by_tokens(explanation, contexts)
        literal = any(named(phrase) for read in parsed(explanation) for phrase in read.phrases())
        if not lines or self.way == "tokens" or literal or simulation_CT.max() > SEES:
            return simulation_CT
        return self.by_lines(explanation, contexts)

    def yes(self, explanation, question, texts):
        """Log odds that the answer to a question about each text begins with yes, [texts]."""
        about = partial(prompts.yes_messages, self.interpreter.plain(explanation), question)
        return self.interpreter.yes(texts, about, self._batch_size, self._progress)

    def by_lines(self, explanation, contexts):
        """Digits after each token of a context, against those under the neutral explanation."""
        keys = [(context.row, *context.texts) for context in contexts]
        for key, context in zip(keys, contexts, strict=True):
            if key not in self._neutral:
                self._neutral[key] = self._lines(prompts.NEUTRAL, [context])[0]
        neutral_CTd = torch.stack([self._neutral[key] for key in keys])
        return contrasted(self._lines(explanation, contexts), neutral_CTd)

    def _lines(self, explanation, contexts):
        visible = [context.visible() for context in contexts]
        return self.interpreter.readings(explanation, visible, self._batch_size, self._progress)

    def by_tokens(self, explanation, contexts):
        """The largest of the explanation's parts at each token; see the grammar above."""
        self.read([explanation])
        tokens = Tokens([context.texts for context in contexts])
        ids = [self._ids(text) for text in tokens.texts]
        most = max(map(len, ids))
        ids_US = torch.tensor([some + some[:1] * (most - len(some)) for some in ids])
        return torch.stack([self._part(read, tokens, ids_US) for read in parsed(explanation)]).amax(0)

    def _part(self, read, tokens, ids_US):
        values_CT = tokens.each([1.0] * len(tokens.texts))
        if read.what:
            values_CT = self._values(read.what, tokens, ids_US)
        elif read.named:
            values_CT = tokens.each([any(map(str.isalpha, text)) for text in tokens.texts])
        elif read.side:
            values_CT = tokens.each([bool(text.strip()) for text in tokens.texts])
        beside_CT = torch.ones_like(values_CT)
        for phrases in read.neighbours:
            together_CT = torch.minimum(self._values(phrases, tokens, ids_US), beside_CT)
            beside_CT = tokens.beside(together_CT, read.side)
        return values_CT * beside_CT

    def _values(self, phrases, tokens, ids_US):
        score_V = torch.stack([self._phrases[phrase] for phrase in phrases]).amax(0)
        read_U = torch.sigmoid(score_V[ids_US].amax(1) - TOKEN_THRESHOLD)
        literal = set(map(named, phrases))
        return tokens.each(read_U.masked_fill(torch.tensor([t in literal for t in tokens.typed]), 1.0))

    def _ids(self, text):
        """Of each way to spell a token its first id."""
        if text not in self._spelt:
            self._spelt[text] = [self.interpreter.encode(way, "`")[0][0] for way in spellings(text)]
        return self._spelt[text]

    def forget(self):
        """Read phrases anew: their last bits depend on the batch, and a group's on no group before it."""
        self._phrases.clear()

    def read(self, explanations):
        """Read, all together, what `by_tokens` needs of these explanations: of each of their phrases how much
        more likely it makes each token than nothing in particular, [V].
        """
        if self.way == "expected":
            return
        phrases = {phrase for text in explanations for read in parsed(text) for phrase in read.phrases()}
        # Those of a length beside each other, so that little is filling.
        lacking = sorted(phrases - self._phrases.keys(), key=lambda phrase: (len(phrase), phrase))
        if not lacking:
            return
        self._base = self._base or [base_1V[0] for base_1V in self._log_p([prompts.NEUTRAL])]
        pairs = zip(self._log_p(lacking), self._base, strict=True)
        over = [log_p_BV - (base_V.exp() + FLOOR).log() for log_p_BV, base_V in pairs]
        self._phrases |= zip(lacking, sum(over) / len(over), strict=True)

    def _log_p(self, phrases):
        """Of each question that asks for a token, log p [phrases, V] of what comes next."""
        how = {"begin": prompts.TOKEN_REPLY, "batch_size": self._batch_size, "progress": self._progress}
        abouts = [partial(prompts.token_messages, shots) for shots in prompts.TOKEN_SHOTS]
        return [self.interpreter.next_token(phrases, about, **how) for about in abouts]


def spellings(text):
    """How a token may look in the vocabulary of an LLM that is asked for it."""
    characters = [char for char in dict.fromkeys(text.strip() or text) if not char.isalpha()]
    literal = [char for char in characters if char.strip()]
    names = [name for char in characters for name in NAMES.get(char, "").split()]
    return list(dict.fromkeys([prompts.typed(text), *literal, *names]))
