"""Hands that explain: what counting finds in literal text, what of an LLM's sentences is kept."""

import re

import torch

from sae.explanations import candidates, prompts
from sae.explanations.candidates import Part, Tokens, cleaned, count, counted, meaning
from sae.explanations.evidence import Context, Feature


def context(text, fires, row=0):
    """Tokens between bars; `fires(token, place, tokens)` tells the activation."""
    texts = text.split("|")
    texts += ["\n"] * (20 - len(texts))
    return Context(row, texts, torch.tensor([float(fires(*each, texts)) for each in _placed(texts)]))


def _placed(texts):
    return [(text.strip(), place) for place, text in enumerate(texts)]


CODE = [
    "from| os| import| path|\n|import| re|\n|def| read|(|name|):|\n",
    "x| =| f|(|a|[|1|])|\n|return| x|\n|def| write|(|self|):|\n",
    "class| Node|(|Base|):|\n|    |def| visit|(|self|,| node|):|\n",
    "import| sys|\n|try|:|\n|    |raise| Error|(|x|)|\n|#| a| note| on| it|\n",
]


def contexts(fires):
    return [context(text, fires, row) for row, text in enumerate(CODE)]


def test_counting_names_the_tokens_that_carry_the_activation():
    assert counted(contexts(lambda token, _, __: token == "import")) == "the word import"
    two = contexts(lambda token, _, __: {"def": 2, "return": 3}.get(token, 0))
    assert counted(two) == "the words def and return"
    assert counted(contexts(lambda token, _, __: token == "):")) == "the token `):`"
    assert counted(contexts(lambda token, place, texts: "\n" in texts[place])) == "new lines"


def test_counting_names_the_neighbour_where_it_decides():
    after = contexts(lambda _, place, texts: place > 0 and texts[place - 1].strip() == "def")
    assert counted(after) == "the token after def"
    before = contexts(lambda token, place, texts: token == "(" and texts[place + 1] == "self")
    assert counted(before) == "`(` before self"
    comment = contexts(
        lambda _, place, texts: "#" in texts[:place] and "\n" not in texts[texts.index("#") : place + 1]
    )
    assert counted(comment) == "the token in a line after `#`"


def test_counting_prefers_a_token_to_its_neighbours_where_both_tell_the_same():
    assert count(contexts(lambda token, _, __: token == "try"))[0] == Part("try")
    assert counted([]) == ""
    assert counted(contexts(lambda *_: 0)) == ""


def test_counting_weighs_how_exclusively_a_token_fires():
    """`(` fires twice and is silent three times; `re` and `sys` fire whenever they are seen."""
    fires = contexts(lambda token, place, texts: token in ("re", "sys") or (token, place) == ("(", 2))
    assert counted(fires).startswith("the words ") and "`(`" not in counted(fires).split(";")[0]


def test_a_part_holds_where_its_token_stands_beside_its_neighbour():
    tokens = Tokens([["def", " name", "(", "name", "\n", "name"]])
    assert Part("name").holds(tokens)[0].tolist() == [False, True, False, True, False, True]
    assert Part("name", "after", "def").holds(tokens)[0].tolist() == [False, True, False, False, False, False]
    assert Part(None, "before", "(").holds(tokens)[0].tolist() == [False, True, False, False, False, False]
    assert Part("name", "in a line after", "(").holds(tokens)[0].tolist() == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    assert Part(None, "in a line after", "def").holds(tokens)[0].tolist() == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]


def test_words_of_the_grammar_are_written_as_code():
    fires = contexts(lambda token, _, __: token == "on")
    assert counted(fires) == "the word on"
    said = counted([context("x|in|y|in|\n", lambda token, _, __: token == "in")])
    assert said == "the token `in`" or said == "the word `in`"


def test_meaning_is_what_two_explanations_can_share():
    assert meaning("the word self") & meaning("self before `.`") == {"self"}
    assert not meaning("the word import") & meaning("the words try and raise")
    assert meaning("closing brackets, such as `)`") == {"closing", "bracket", ")"}
    assert meaning("The keyword Import") == meaning("imports")


def test_a_list_that_repeats_is_cut_to_its_distinct_words():
    assert cleaned("the words a, b, a and b", []) == "the words a, b, a"
    assert cleaned("the word get, set, get, set, get", []) == "the word get, set, get"
    assert cleaned("the names of files", []) == "the names of files"


def test_a_copied_example_is_no_candidate_unless_the_feature_fires_on_its_words():
    for shot in (*prompts.SHOTS, *prompts.EXCERPT_SHOTS):
        assert cleaned(shot[0], ["nowhere"]) == ""
    assert cleaned("the word import", ["import"]) == "the word import"
    assert cleaned("the digits 0 and 1", ["1"]) == "the digits 0 and 1"
    assert cleaned("the word return", ["nowhere"]) == "the word return"


def test_what_goes_round_in_circles_is_no_candidate():
    assert cleaned('the string "1111111111111111111111"', []) == ""
    assert cleaned('the string "1,423,232,232,232,232,232,232,232"', []) == ""
    assert cleaned("the token `....`", []) == "the token `....`"


def feature(count=20):
    shown = [
        Context(row, ["a", f" w{row}", "b"], torch.tensor([0.0, 10.0 - row / 4, 0.0])) for row in range(count)
    ]
    return Feature(7, -2.0, 10.0, shown, [], [], [])


def test_as_many_hands_are_asked_as_explanations_are_wanted():
    hands = {
        number: [hand for hand, _ in candidates.questions(feature(), number, seed=0)]
        for number in range(1, 6)
    }
    assert hands == {1: ["text"], 2: ["text"], 3: ["text", "lines"], 4: ["text", "lines", "text"], 5: [
        "text", "lines", "text", "lines"]}  # fmt: skip
    assert candidates.questions(feature(0), 3, seed=0) == []


def test_the_first_question_of_a_hand_spans_the_range_and_later_ones_a_random_half():
    asked = candidates.questions(feature(), 5, seed=0)
    text = asked[0][1]
    assert "« w0»" in text and "« w19»" in text and text.count("\n") == candidates.EXCERPTS
    lines = asked[1][1]
    assert lines.index("·w0\t10") < lines.index("·w19")
    again = candidates.questions(feature(), 5, seed=0)
    assert again == asked and candidates.questions(feature(), 5, seed=1)[2] != asked[2]
    assert asked[2][1] != text and asked[3][1] != lines
    for _, later in asked[2:]:  # the strongest first there too
        rows = [int(number) for number in re.findall(r"w(\d+)(?:»|\t)", later)]
        assert rows[:4] == sorted(rows[:4])


def test_what_was_counted_is_said_beside_the_excerpts():
    half = feature(4)
    shown = [*half.shown, Context(9, ["a", " w0", "b"], torch.tensor([2.0, 0.0, 0.0]))]
    ((_, text),) = candidates.questions(half._replace(shown=shown), 1, seed=0)
    assert text.endswith("Counted: w0 1 of 2, w1 1 of 1, w2 1 of 1, w3 1 of 1, a 1 of 5, b 0 of 5")


def test_activations_are_scaled_by_the_features_maximum_not_by_the_contexts():
    one = feature(1)
    weak = one._replace(max_activation=100.0)
    ((_, text),) = [question for question in candidates.questions(weak, 3, 0) if question[0] == "lines"]
    assert "·w0\t1\n" in text
