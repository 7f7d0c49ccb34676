"""Prompts as pure text: what the interpreter reads, and what is taken from its replies.

After Bills et al. 2023, "Language models can explain neurons in language models".
"""

import re

EXPLAIN_TOP, SIMULATE_TOP = 10, 9
NEUTRAL = "nothing in particular"
SPACE = "·"
CIRCLE = re.compile(r"(\w.{0,30}?)\1{4}")  # what is said five times in a row never ends
NAMED = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", " ": SPACE, SPACE: "\\" + SPACE}

STUDY = "You study features of a language model that reads source code."
MARKS = f"In the tokens {SPACE} stands for a space, \\n for a new line and \\t for a tab."
EXPLAIN = (
    f"{STUDY} Each line holds one token and, after a tab, how strongly the feature fires on it, from 0 to "
    f"{EXPLAIN_TOP}. {MARKS} Say in one short sentence what the feature fires on."
)
EXCERPTS = (
    f"{STUDY} In each excerpt the tokens that a feature fires on stand between « and »; the last line counts "
    "how many times it fired on a token, of how many times that token was seen. "
    "Say in one short sentence what the feature fires on."
)
SIMULATE = (
    f"{STUDY} Given what a feature fires on, write for each token, after a tab, how strongly the feature "
    f"fires on it, from 0 to {SIMULATE_TOP}. {MARKS}"
)
REPLY = "The feature fires on"

# Features made up for the few-shot part: what they fire on, and token:strength of a context. The explanations
# name tokens: small models then name the ones they see, instead of repeating an explanation they were shown.
SHOTS = (
    (
        "the word import",
        "from:0|·os:0|·import:9|·path:0|\\n:0|import:8|·re:0|\\n:0|def:0|·read:0|(:0|name:0|)::0|\\n:0",
    ),
    (
        "closing brackets, ) and ]",
        "x:0|·=:0|·f:0|(:0|a:0|[:0|1:0|]:7|):9|\\n:0|print:0|(:0|x:0|):9|\\n:0|return:0|·x:0|\\n:0",
    ),
    (
        "the digits 0 and 1",
        "x:0|·=:0|·:0|0:9|.:0|5:1|\\n:0|for:0|·i:0|·in:0|·range:0|(:0|1:8|0:9|):0|:::0|\\n:0|···:0|·return:0|·x:0",
    ),
    (
        "words about files, such as file, open and folder",
        "···:0|·with:0|·open:5|(:0|file:9|name:3|):0|·as:0|·handle:0|:::0|\\n:0|···:0|·folder:9|·=:0|·1:0",
    ),
)  # fmt: skip

EXCERPT_SHOTS = (
    ("the word import", ["from os «import» path\\n", "«import» re\\n«import» sys\\n"], "import 3 of 3"),
    ("the name after class", ["class« Shape»:\\n", "\\nclass« Node»(Base"], "Shape 1 of 1, Node 1 of 2"),
    ("closing brackets, ) and ]", ["f(a[1«])»\\n", "print(x«)»"], ") 1 of 1, ]) 1 of 1"),
    (
        "words about files, such as file, open and folder",
        ["with« open»(«file»name)", "« folder» = 1"],
        "open 1 of 1, file 1 of 1, folder 1 of 2",
    ),
)
# What a token reading asks, without and with examples before it; the model goes on after a backtick.
TOKEN_SHOTS = ((), (("the word while", "while"), ("plus signs", "+")))
TOKENS = f"{STUDY} Give a token on which the feature fires."
TOKEN_REPLY = "It fires on `"


def token_texts(tokenizer, ids):
    """What each token id stands for in a text, white space included: list of str.

    SentencePiece marks spaces with ▁ and writes bytes as <0x0A>; byte-level tokens decode to themselves. Part
    of a character has no text of its own and keeps the tokenizer's name for it.
    """
    texts = []
    for id, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
        if byte and int(byte[1], 16) < 128:
            texts.append(chr(int(byte[1], 16)))
        elif name.startswith("▁"):
            texts.append(name.replace("▁", " "))
        else:
            text = tokenizer.decode([id], clean_up_tokenization_spaces=False)
            texts.append(name if "�" in text or not text else text)
    return texts


def visible(text):
    """A token's text with its white space shown: on one line, without tabs, and no two texts alike."""
    return "".join(NAMED.get(char) or (char if char.isprintable() else f"\\x{ord(char):x};") for char in text)


def typed(text):
    """A token's text as people type it into a search: no white space around it; that alone is spelt out."""
    if text.strip():
        return text.strip()
    return "\\n" if "\n" in text or "\r" in text else "\\t" if "\t" in text else "space"


def scaled(activations, maximum, top):
    """Activations (floats >= 0) as whole numbers up to `top`, which `maximum` becomes; what fires is >= 1."""
    return [min(top, max(1, round(top * a / maximum))) if a > 0 else 0 for a in activations]


def lines(tokens, numbers):
    """One `token<tab>number` line per token (`tokens` as `visible` shows them)."""
    return "".join(f"{token}\t{number}\n" for token, number in zip(tokens, numbers, strict=True))


def explain_question(contexts):
    """The user's turn: contexts as (visible tokens, whole numbers); what fires again where that is little.

    The strongest first: a small model explains by what it reads there first.
    """
    text = "".join(f"<start>\n{lines(*context)}<end>\n" for context in contexts)
    pairs = [pair for context in contexts for pair in zip(*context, strict=True)]
    fires = sorted((pair for pair in pairs if pair[1]), key=lambda pair: -pair[1])
    if 0 < len(fires) * 5 < len(pairs):
        text += f"Where it fires, strongest first:\n<start>\n{lines(*zip(*fires, strict=True))}<end>\n"
    return text


def excerpt_question(excerpts, counts):
    """The user's turn of the text hand: excerpts of code with marks, a line each, and what was counted."""
    return "".join(f"- {excerpt}\n" for excerpt in excerpts) + f"Counted: {counts}"


def excerpt(texts, active):
    """A context on one line, the tokens where `active` is true between « and », which the code loses."""
    plain = [text.replace("«", "<<").replace("»", ">>") for text in texts]
    marked = (f"«{text}»" if fires else text for text, fires in zip(plain, active, strict=True))
    return "".join(marked).replace("\n", "\\n").replace("\r", "").replace("\t", "\\t")


def explain_messages(question):
    """Chat messages that ask for an explanation of token<tab>activation lines."""
    shots = [(explain_question([_shot(shot, EXPLAIN_TOP)]), f"{REPLY} {said}.") for said, shot in SHOTS]
    return _messages(EXPLAIN, shots, question)


def excerpt_messages(question):
    """Chat messages that ask for an explanation of marked excerpts."""
    shots = [(excerpt_question(*shot), f"{REPLY} {said}.") for said, *shot in EXCERPT_SHOTS]
    return _messages(EXCERPTS, shots, question)


def simulate_messages(explanation):
    """Chat messages that ask for the activations of a feature that fires on what `explanation` says."""
    shots = [(f"{REPLY}:\n{said}", lines(*_shot(shot, SIMULATE_TOP)).rstrip("\n")) for said, shot in SHOTS]
    return _messages(SIMULATE, shots, f"{REPLY}:\n{explanation}")


def token_messages(shots, explanation):
    """Chat messages that ask for a token on which a feature fires, after `shots` (explanation, token)."""
    told = [(f"{REPLY} {said}.", f"{TOKEN_REPLY}{token}`.") for said, token in shots]
    return _messages(TOKENS, told, f"{REPLY} {explanation}.")


def yes_messages(explanation, question, text):
    """Chat messages that ask `question`, to be answered by yes or no, of a text."""
    asked = f"A feature fires on {explanation}. {question} Answer yes or no.\n\n{text}"
    return _messages(STUDY, (), asked)


def _messages(system, shots, question):
    """What it is about, some questions with their replies, the question."""
    roles = ("user", "assistant")
    turns = [(role, text) for shot in shots for role, text in zip(roles, shot, strict=True)]
    turns = [("system", system), *turns, ("user", question)]
    return [{"role": role, "content": text} for role, text in turns]


def _shot(shot, top):
    tokens, numbers = zip(*(pair.rsplit(":", 1) for pair in shot.split("|")), strict=True)
    return tokens, [round(int(number) * top / SIMULATE_TOP) for number in numbers]


def sentence(reply):
    """The first sentence of a reply without its full stop, and whether the reply reached its end or a CIRCLE.

    A full stop, question or exclamation mark ends it after a word, bracket or quotation mark and before a
    capital: all others may be code that the sentence speaks of.
    """
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<=[\w)\]\"'`])[.!?]+[\"'`)]*\s+(?=[A-Z])|\n", reply.lstrip())
    text = reply.lstrip()[: end.start()] if end else reply
    return re.sub(r"(?<=[\w)\]\"'`])\.+$", "", text.strip()).strip(), bool(end or CIRCLE.search(text))
