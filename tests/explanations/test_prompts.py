"""Prompts against literal text: what the interpreter reads, and what is taken from its replies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sae.explanations import prompts


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def test_a_tokens_white_space_is_shown():
    assert prompts.visible(" import") == "·import"
    assert prompts.visible("\n\t  x") == "\\n\\t··x"
    assert prompts.visible("\\n") == "\\\\n"
    assert prompts.visible("·") == "\\·"
    assert prompts.visible("a\u00a0\u2028b\r") == "a\\xa0;\\x2028;b\\r"


@given(st.text(), st.text())
def test_no_two_tokens_look_alike_and_none_breaks_its_line(one, other):
    assert (prompts.visible(one) == prompts.visible(other)) == (one == other)
    assert not any(char.isspace() for char in prompts.visible(one))
    assert prompts.visible(one).splitlines() == ([prompts.visible(one)] if one else [])


def test_tokens_as_people_type_them():
    assert prompts.typed(" import") == "import"
    assert prompts.typed("\n\nx ") == "x"
    assert [prompts.typed(text) for text in ("   ", "\t", "\n    ", "\r\n")] == ["space", "\\t", "\\n", "\\n"]


def test_token_texts_put_the_text_together_again(tokenizer, stdlib):
    text = (stdlib / "abc.py").read_text()[:2000]
    texts = prompts.token_texts(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(texts) == text
    assert " import" in prompts.token_texts(tokenizer, tokenizer("from a import b")["input_ids"])


def test_part_of_a_character_keeps_a_name_of_its_own(tokenizer):
    ids = tokenizer("\U0001f9ff")["input_ids"]
    assert len(ids) > 1
    texts = prompts.token_texts(tokenizer, ids)
    assert "�" not in "".join(texts) and all(texts)


class SentencePiece:
    """What token_texts asks a tokenizer, as CodeLlama's answers (there is none of its kind without a hub)."""

    names = ("▁import", "▁▁▁", "<0x0A>", "os", "<0x09>", "<0xE2>")

    def convert_ids_to_tokens(self, ids):
        return [self.names[id] for id in ids]

    def decode(self, ids, **_options):
        return {3: "os", 5: "�"}[ids[0]]


def test_sentencepiece_marks_become_what_they_stand_for():
    texts = prompts.token_texts(SentencePiece(), [0, 1, 2, 3, 4, 5])
    assert texts == [" import", "   ", "\n", "os", "\t", "<0xE2>"]


def test_activations_become_whole_numbers_and_what_fires_is_not_nothing():
    assert prompts.scaled([0.0, 0.01, 1.0, 2.0, 4.0], 4.0, 10) == [0, 1, 2, 5, 10]
    assert prompts.scaled([5.0], 4.0, 9) == [9]


def test_what_fires_is_listed_again_where_it_is_less_than_a_fifth():
    few = (["a", "b", "·c", "d", "e", "f"], [0, 0, 7, 0, 0, 0])
    assert prompts.explain_question([few]) == (
        "<start>\na\t0\nb\t0\n·c\t7\nd\t0\ne\t0\nf\t0\n<end>\n"
        "Where it fires, strongest first:\n<start>\n·c\t7\n<end>\n"
    )
    weak = (["x"] * 9 + ["y"], [0] * 9 + [2])
    assert prompts.explain_question([weak, few]).endswith("first:\n<start>\n·c\t7\ny\t2\n<end>\n")
    fifth = (["a", "b", "c", "d", "e"], [0, 3, 0, 0, 0])
    assert "Where it fires" not in prompts.explain_question([fifth])
    two = prompts.explain_question([few, (["x"] * 6, [0] * 6)])
    assert two.count("<start>") == 3 and two.endswith("strongest first:\n<start>\n·c\t7\n<end>\n")


def test_the_few_shot_examples_are_lines_with_a_number():
    for messages, top in ((prompts.explain_messages("?"), 10), (prompts.simulate_messages("?"), 9)):
        for message in messages[1:-1]:
            numbers = [line.split("\t")[1] for line in message["content"].split("\n") if "\t" in line]
            assert all(0 <= int(number) <= top for number in numbers)
        assert f"·import\t{top}\n" in messages[1]["content"] + messages[2]["content"]
    assert len(prompts.explain_messages("?")) == 2 + 2 * len(prompts.SHOTS)


def test_a_reply_ends_with_its_first_sentence():
    assert prompts.sentence(" the word self. It is") == ("the word self", True)
    assert prompts.sentence(" the word self.x and") == ("the word self.x and", False)
    assert prompts.sentence(" the word self.") == ("the word self", False)  # the next token may be "x"
    for names in ("names, e.g. Foo", "names, i.e. Foo"):
        assert prompts.sentence(f" {names}") == (names, False)
    assert prompts.sentence(" imports\nThe") == ("imports", True)
    assert prompts.sentence(" a, b, a, b, a, b, a, b, ") == ("a, b, a, b, a, b, a, b,", False)
    assert prompts.sentence(" a, b, a, b, a, b, a, b, a, b, ")[1]  # in circles: it is not waited for


def test_a_reply_is_not_cut_inside_code():
    for code in (
        "the . operator",
        '"!" and "?"',
        "`self.x.y`",
        "names, e.g. `foo`. ",
        "a dot. then more",
        "...",
    ):
        assert prompts.sentence(f" {code}")[0] == code.strip().rstrip(".") or code == "..."
    assert prompts.sentence(' "!" and "?" in strings. It')[0] == '"!" and "?" in strings'
    assert prompts.sentence(" the token `.`. It fires")[0] == "the token `.`"


def test_an_excerpt_is_one_line_with_marks_that_code_cannot_have():
    assert (
        prompts.excerpt(["from", " a", "\r\n\t", "«b»"], [True, False, False, True])
        == "«from» a\\n\\t«<<b>>»"
    )
    assert prompts.excerpt_question(["a", "b"], "a 1 of 2") == "- a\n- b\nCounted: a 1 of 2"


def test_what_is_asked_of_a_text_and_for_a_token():
    asked = prompts.yes_messages("the word import", "Does it fire?", "from x")
    assert (
        asked[-1]["content"]
        == "A feature fires on the word import. Does it fire? Answer yes or no.\n\nfrom x"
    )
    plain = prompts.token_messages((), "commas")
    assert plain[-1]["content"] == "The feature fires on commas."
    assert len(plain) == 2 and len(prompts.token_messages(prompts.TOKEN_SHOTS[1], "commas")) == 6
