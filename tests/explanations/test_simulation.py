"""Readings of explanations: the grammar by hand, planted features in real code by the real SmolLM2."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from sae.explanations import prompts
from sae.explanations.evidence import Context
from sae.explanations.interpreter import Interpreter
from sae.explanations.scoring import correlation
from sae.explanations.simulation import THRESHOLD, Simulator, contrasted, named, parsed, spellings


def test_what_an_explanation_says_of_neighbours():
    def read(text):
        return [(one.what, one.side, one.neighbours) for one in parsed(text)]

    assert read("the word try") == [(("the word try",), None, ())]
    assert read("the words return and raise; the token `(`") == [
        (("the word return", "the word raise"), None, ()), (("the token `(`",), None, ()),
    ]  # fmt: skip
    assert read("the name after def") == [((), "after", (("the word def",),))]
    assert read("what follows the word raise") == [((), "after", (("the word raise",),))]
    assert read("self before `.`") == [(("the word self",), "before", (("the token `.`",),))]
    assert read("an attribute after self.") == [((), "after", (("the word self",), ("the token `.`",)))]
    assert read("the name preceding self.") == [((), "before", (("the token `.`",), ("the word self",)))]
    assert read("words that come before and after") == [(("words that come before and after",), None, ())]
    assert read("the words of a comment") == [((), "in a line after", (("the token `#`", "the token `//`"),))]
    assert read("the token in a line after `#`") == [((), "in a line after", (("the token `#`",),))]
    assert read("words about files, such as open") == [(("words about files", "the word open"), None, ())]
    assert read(";") == [(("the token `;`",), None, ())]
    # What stands in backticks is never taken for grammar.
    assert read("the token `after`") == [(("the word after",), None, ())]
    assert read("the token `; before`") == [(("the token `; before`",), None, ())]


def test_what_is_named_literally():
    assert named("the word self") == "self" and named("the token `),`") == "),"
    assert (named("new lines"), named("spaces")) == ("\\n", "space")
    assert named("words about files") is None and named("the word of a comment") is None


def test_a_token_is_also_read_by_its_characters_and_their_names():
    assert spellings(" import") == ["import"]
    assert spellings('",')[:3] == ['",', '"', ","] and "comma" in spellings('",')
    assert "space" in spellings("    ") and "newline" in spellings("\n    ")


def test_expected_and_contrastive_readings_by_hand():
    p = torch.full((1, 1, 10), 0.05)
    p[..., 0], p[..., 9] = 0.1, 0.5  # non-zero: 0.9
    assert contrasted(p.log()).item() == pytest.approx(0.05 * 36 + 9 * 0.5)
    neutral = torch.full((1, 1, 10), 0.1)  # non-zero: 0.9 as well, so the explanation says nothing
    nothing = contrasted(p.log(), neutral.log()).item()
    assert nothing == pytest.approx(1 / (1 + math.exp(THRESHOLD)), rel=1e-4)
    neutral[..., 0], neutral[..., 1:] = 0.5, 0.5 / 9  # odds of 9 against 1
    assert contrasted(p.log(), neutral.log()).item() == pytest.approx(
        1 / (1 + math.exp(THRESHOLD - 2 * math.log(9))), rel=1e-4
    )


@pytest.fixture(scope="module")
def interpreter(smollm2):
    from sae import models

    return Interpreter(models.load_model(smollm2, dtype="float32"), models.load_tokenizer(smollm2))


@pytest.fixture(scope="module")
def code(stdlib_contexts, smollm2):
    """240 contexts of 32 tokens of real code, as text."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [prompts.token_texts(tokenizer, row[:32]) for row in stdlib_contexts[0]]


def planted(code, fires, most=6):
    """Contexts where a feature fires as `fires(tokens, place)` tells, and as many where it does not."""
    tokens = [[prompts.typed(text) for text in texts] for texts in code]
    values = [[float(fires(row, place)) for place in range(len(row))] for row in tokens]
    both = [[row for row in range(len(code)) if (max(values[row]) > 0) == on][:most] for on in (True, False)]
    assert len(both[0]) == most
    return [Context(row, code[row], torch.tensor(values[row])) for row in both[0] + both[1]]


LEXICAL = {
    "the keyword import": lambda row, i: row[i] == "import",
    "closing brackets": lambda row, i: any(char in ")]}" for char in row[i]),
    "commas": lambda row, i: "," in row[i],
    "digits and numbers": lambda row, i: any(char.isdigit() for char in row[i]),
    "the words def and class": lambda row, i: row[i] in ("def", "class"),
}
CONTEXTUAL = {
    "the name after import": lambda row, i: i > 0 and row[i - 1] == "import" and row[i][0].isalpha(),
    "the name after def": lambda row, i: i > 0 and row[i - 1] == "def" and any(map(str.isalpha, row[i])),
    "the token before `=`": lambda row, i: i + 1 < len(row) and row[i + 1] == "=",
}


def score(simulate, explanation, contexts):
    return (
        correlation(simulate(explanation, contexts), torch.stack([one.values_T for one in contexts])) or 0.0
    )


def simulated(explanation, *texts):
    """The tokens on which the token reading fires."""
    values_CT = Simulator(Even(), "tokens")(explanation, [Context(0, list(texts), torch.zeros(len(texts)))])
    return [text for text, value in zip(texts, values_CT[0].tolist(), strict=True) if value > 0.9]


class Even:
    """An interpreter to which all tokens are alike, but for token 0 under what is odd, 1 under what is half
    of the questions.
    """

    plain = staticmethod(lambda text: text)

    def encode(self, text, _before=""):
        return [1], [(0, len(text))]

    def next_token(self, texts, about, **_how):
        log_p_BV = torch.full((len(texts), 2), 1e-6).log()
        log_p_BV[[place for place, text in enumerate(texts) if "odd" in text], 0] = 0.0
        if not about.args[0]:  # no shots
            log_p_BV[[place for place, text in enumerate(texts) if "half" in text], 1] = 0.0
        return log_p_BV


def test_a_part_fires_where_all_of_its_neighbours_stand_and_nowhere_else():
    assert simulated("the token after self.", "a", "self", ".", "b", ".", "c") == ["b"]
    assert simulated("the token before self.", "a", "self", ".", "b", ".", "self", "c") == ["a"]
    assert simulated("the token after `(`", "(", "  ", "(", "b") == ["b"]  # white space is none
    assert simulated("the name after `(`", "(", "1", "(", "_", "(", "b1") == ["b1"]
    assert simulated("the words a and b; the word c", "a", "x", "b", "c") == ["a", "b", "c"]
    assert simulated("odd ones", "import", "1") == []  # of few spellings none is made up


def test_a_token_reading_by_hand():
    """The mean of both questions, over what is likely anyway: 1e-6, and the floor."""
    over = (math.log(1.0 / 1.1e-5) + math.log(1e-6 / 1.1e-5)) / 2
    value = Simulator(Even(), "tokens")("half of them", [Context(0, ["x"], torch.zeros(1))]).item()
    assert value == pytest.approx(1 / (1 + math.exp(5 - over)), rel=1e-4)


def test_an_explanation_in_a_question_is_no_control_text():
    said = SimpleNamespace(plain=str.upper, yes=lambda texts, about, *_how: about(texts[0])[-1]["content"])
    asked = Simulator(said, "tokens").yes("odd", "Why?", ["t"])
    assert asked == "A feature fires on ODD. Why? Answer yes or no.\n\nt"


def test_right_explanations_are_recognised_and_wrong_ones_are_not(interpreter, code):
    simulate, right, wrong = Simulator(interpreter, "contrastive"), {}, {}
    planted_in = {name: planted(code, rule) for name, rule in (LEXICAL | CONTEXTUAL).items()}
    names = list(planted_in)
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        right[name] = score(simulate, name, planted_in[name])
        wrong[name] = score(simulate, other, planted_in[name])
    assert sum(right[name] for name in LEXICAL) / len(LEXICAL) > 0.8, right
    assert sum(right[name] for name in CONTEXTUAL) / len(CONTEXTUAL) > 0.7, right
    assert min(right.values()) > 0.5, right
    assert abs(sum(wrong.values()) / len(wrong)) < 0.1, wrong


def test_what_is_literal_fires_there_whatever_the_llm_makes_of_it(interpreter, code):
    simulate = Simulator(interpreter, "tokens")
    contexts = planted(code, lambda row, i: row[i] == ".")
    assert score(simulate, "the token `.`", contexts) > 0.95
    contexts = planted(code, lambda row, i: row[i] == "self", most=2)
    assert score(simulate, "the word self", contexts) > 0.95
    assert score(simulate, "the word nowhere; the word self", contexts) > 0.95  # one part is enough
    contexts = planted(code, lambda row, i: i > 1 and row[i - 2 : i] == ["self", "."], most=2)
    assert score(simulate, "the token after self.", contexts) > 0.95  # both neighbours are needed


def test_a_simulation_depends_on_its_explanation_and_context_alone(interpreter, code):
    contexts = planted(code, LEXICAL["commas"], 2)
    for way in ("contrastive", "tokens"):
        together = Simulator(interpreter, way)
        together("the keyword import", contexts[2:])
        alone = Simulator(interpreter, way)
        for context, row_T in zip(contexts, together("commas; names of files", contexts), strict=True):
            torch.testing.assert_close(row_T, alone("commas; names of files", [context])[0])


class Digits:
    """An interpreter that counts what it reads as lines, and whose token reading sees nothing."""

    def __init__(self, interpreter):
        self.asked, self.plain, self.encode = [], interpreter.plain, interpreter.encode

    def readings(self, explanation, contexts, _batch_size, progress=None):
        self.asked.append((explanation, len(contexts)))
        p = torch.full((len(contexts), len(contexts[0]), 10), 0.02)
        fires = torch.tensor([[explanation in token for token in tokens] for tokens in contexts])
        p[..., 0], p[..., 9] = 0.82 - 0.8 * fires, 0.02 + 0.8 * fires
        return p.log()

    def next_token(self, texts, *_more, **_how):
        return torch.zeros(len(texts), 60_000).log_softmax(-1)


def test_lines_are_read_where_tokens_say_nothing_and_the_neutral_ones_once(interpreter):
    digits = Digits(interpreter)
    contexts = [Context(row, ["x", "odd", "y"], torch.tensor([0.0, 2.0, 0.0])) for row in (3, 4)]
    simulate = Simulator(digits, "contrastive")
    # Two words, so nothing is literal; Digits' lines fire where the explanation stands in the token.
    odd = [one._replace(texts=["x", "odd one", "y"]) for one in contexts]
    values_CT = simulate("odd one", [one._replace(texts=["x", "odd one here", "y"]) for one in odd])
    assert (values_CT.argmax(1) == 1).all() or values_CT.max() < 0.5
    assert digits.asked[0][0] == prompts.NEUTRAL
    before = digits.asked.count((prompts.NEUTRAL, 1))
    simulate(
        "odd one", [one._replace(texts=["x", "y", "x"]) for one in contexts]
    )  # their rows in other words
    assert digits.asked.count((prompts.NEUTRAL, 1)) == 4
    simulate("odd two", [one._replace(texts=["x", "odd one here", "y"]) for one in odd])
    assert digits.asked.count((prompts.NEUTRAL, 1)) == before + 2 == 4  # each context alone, once
    assert Simulator(digits, "tokens")("odd one", odd).max() < 0.5
    digits.asked.clear()
    Simulator(digits, "contrastive")("odd one", odd, lines=False)
    assert digits.asked == []


def test_each_way_reads_as_it_says(interpreter):
    digits = Digits(interpreter)
    contexts = [Context(3, ["x", "x y", "z"], torch.zeros(3))]
    expected_CT = Simulator(digits, "expected")("x·y", contexts)
    assert digits.asked == [("x·y", 1)]  # no neutral reading
    assert expected_CT[0].tolist() == pytest.approx([0.02 * 45, 0.02 * 36 + 0.82 * 9, 0.02 * 45])
    digits.asked.clear()
    Simulator(digits, "tokens")("the word odd", contexts)
    assert digits.asked == []
    Simulator(digits, "contrastive")("the word odd", contexts)
    assert digits.asked == []  # named literally: the tokens tell, also that there are none here
