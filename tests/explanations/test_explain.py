"""From contexts to documents: which hand is kept, whose control it is, what is said where nothing can be."""

import torch

from sae.explanations.evidence import Context, Feature
from sae.explanations.explain import MOST_CONTROLS, Explainer, Settings


class Writer:
    """An LLM that writes what it is told to, whatever it is asked; it keeps the questions."""

    tokens_read = 0

    def __init__(self, *sentences):
        self.sentences, self.asked = sentences, []

    def explanations(self, questions, messages_about=None, batch_size=16, progress=None):
        self.asked += [(messages_about.__name__, question) for question in questions]
        progress(len(questions))
        return [self.sentences[len(self.asked) % len(self.sentences)]] * len(questions)


class Literal:
    """A simulator for which an explanation fires on the tokens among its words."""

    def __init__(self, interpreter=None):
        self.interpreter, self.seen, self.together, self.by_lines = interpreter, [], [], []

    def __call__(self, explanation, contexts, lines=True):
        self.seen.append((explanation, [context.row for context in contexts]))
        self.by_lines += self.seen[-1:] if lines else []
        words = explanation.replace("`", "").split()
        return torch.tensor([[float(text.strip() in words) for text in c.texts] for c in contexts])

    def forget(self):
        self.together = []

    def read(self, explanations):
        self.together.append(explanations)

    def yes(self, explanation, _question, texts):
        return torch.tensor([float(explanation.split()[-1] in text) for text in texts])


class Plans:
    """What an Explainer asks of a Plan, over features made by hand."""

    def __init__(self, *features, **chosen):
        self.features, self.settings = features, Settings()._replace(**chosen)

    def feature(self, place):
        return self.features[place]

    def others(self, place):
        return [(place + step) % len(self.features) for step in range(1, len(self.features))]

    def effects(self, _place):
        return {"promotes": ["x"], "suppresses": []}


def feature(dim, word, other="def"):
    """It fires on `word`, not on the `other`: three contexts shown, two to judge by, three to score on."""

    def context(row):
        texts = ["x", f" {word}", f" {other}", " y"]
        return Context(10 * dim + row, texts, torch.tensor([0.0, 2.0, 0.0, 0.0]))

    rows = [context(row) for row in range(8)]
    return Feature(dim, -1.5, 2.0, rows[:3], rows[3:5], rows[5:], [])


def unsure(one):
    """The feature fires on `x` too where it is judged: a counted word scores 0.73 there."""
    return one._replace(
        judging=[c._replace(values_T=torch.tensor([1.5, 2.0, 0.0, 0.0])) for c in one.judging]
    )


def explainer(*features, sentences=("the word y",), **chosen):
    writer = Writer(*sentences)
    simulator = Literal(writer)
    return Explainer(Plans(*features, **chosen), writer, simulator), writer, simulator


def test_the_hand_that_simulates_best_on_the_judging_contexts_is_kept():
    one, _, simulator = explainer(unsure(feature(1, "import")), feature(2, "try"))
    first, second = one.group([0, 1])
    assert (first["interpretation"], first["explained_by"]) == ("the word import", "counted")
    assert first["candidates"] == [
        {"interpretation": "the word import", "explained_by": "counted", "judged": 0.7276},
        {"interpretation": "the word y", "explained_by": "text", "judged": first["candidates"][1]["judged"]},
    ]
    assert first["candidates"][1]["judged"] < 0
    assert ("the word y", [13, 14]) in simulator.seen  # the judging contexts, nothing of what is scored
    assert (first["score"], second["score"]) == (1.0, 1.0)
    better, _, _ = explainer(feature(1, "import"), sentences=("the word import",))
    assert better.group([0])[0]["explained_by"] == "counted"  # said by both: whoever said it first
    equal, _, _ = explainer(unsure(feature(1, "import")), sentences=("the name import",))
    assert equal.group([0])[0]["explained_by"] == "text"  # as good in other words: whoever said it last


def test_the_llm_is_not_asked_where_counting_is_enough_and_what_is_read_is_read_together():
    one, writer, simulator = explainer(feature(1, "import"), unsure(feature(2, "try")), num_explanations=2)
    first, second = one.group([0, 1])
    assert [candidate["explained_by"] for candidate in first["candidates"]] == ["counted"]
    assert [candidate["explained_by"] for candidate in second["candidates"]] == ["counted", "text"]
    assert len(writer.asked) == 1 and "« try»" in writer.asked[0][1]
    assert [texts for texts in simulator.together if texts] == [
        ["the word import", "the word try"],
        ["the word y"],
    ]
    one.group([1])  # to the last bit as if no group had been before it
    assert len(writer.asked) == 2 and len([texts for texts in simulator.together if texts]) == 2
    assert not {13, 14, 23, 24} & {row for _, rows in simulator.by_lines for row in rows}  # tokens are enough


def test_an_llm_that_knows_more_wins():
    odd = feature(1, "import")
    judging = [context._replace(texts=["x", " yes", " def", " y"]) for context in odd.judging]
    one, _, _ = explainer(odd._replace(judging=judging), sentences=("the word yes",))
    assert one.group([0])[0]["explained_by"] in ("text", "lines")


def test_an_undefined_candidate_is_worse_than_any_that_is_judged():
    """`nowhere` is constant on the judging contexts, `y` correlates negatively: it is kept all the same."""
    odd = feature(1, "import")
    judging = [context._replace(texts=["x", " z", " def", " y"]) for context in odd.judging]
    one, _, lines = explainer(odd._replace(judging=judging), sentences=("the word y", "the word nowhere"))
    document = one.group([0])[0]
    assert ("the word nowhere", [13, 14]) in lines.by_lines  # no candidate is known to be right by tokens
    assert document["interpretation"] == "the word y"
    assert [candidate["judged"] for candidate in document["candidates"]][1:] == [None, None]
    one, _, read = explainer(odd._replace(judging=judging), simulation="expected")
    one.group([0])
    assert read.seen.count(("the word y", [13, 14])) == 1  # a way that reads lines at once reads them once


def test_a_single_explanation_is_the_llms_and_needs_no_judge():
    one, writer, simulator = explainer(feature(1, "import"), num_explanations=1)
    (document,) = one.group([0])
    assert document["explained_by"] == "text" and document["candidates"][0]["judged"] is None
    assert [name for name, _ in writer.asked] == ["excerpt_messages"]
    assert simulator.seen == [("the word y", [15, 16, 17])]


def test_both_of_the_llms_hands_are_asked_each_in_its_way():
    one, writer, _ = explainer(unsure(feature(1, "import")))
    one.group([0])
    (text, excerpt), (lines, numbers) = writer.asked
    assert (text, lines) == ("excerpt_messages", "explain_messages")
    assert "- x« import» def y" in excerpt and "import 3 of 3" in excerpt
    assert "·import\t10\n" in numbers


def test_a_control_differs_in_meaning_and_is_sought_in_a_circle():
    features = feature(1, "import"), feature(2, "import"), feature(3, "try")
    one, _, simulator = explainer(*features)
    first, second, third = one.group([0, 1, 2])
    assert (first["control_dim"], second["control_dim"], third["control_dim"]) == (3, 3, 1)
    assert first["control"] is None and "simulation is constant" in first["control_reason"]
    assert ("the word try", [15, 16, 17]) in simulator.seen
    near, _, _ = explainer(feature(1, "import"), feature(2, "def"))
    controlled = near.group([0])[0]  # the other is not asked for, it is explained for the purpose
    assert controlled["control_dim"] == 2 and controlled["control"] < 0


def test_a_document_does_not_depend_on_what_else_is_explained():
    features = [feature(dim, word) for dim, word in enumerate(("import", "try", "import", "return"))]
    timeless = lambda documents: [document | {"time": ""} for document in documents]  # noqa: E731
    together = timeless(explainer(*features)[0].group([0, 1, 2, 3]))
    one = explainer(*features)[0]
    assert timeless(one.group([2]) + one.group([0])) == [together[2], together[0]]


def test_without_another_meaning_there_is_no_control():
    alone = explainer(feature(1, "import"))[0].group([0])[0]
    assert alone["control"] is None and alone["control_dim"] is None and alone["score"] == 1.0
    assert "explanation of other words" in alone["control_reason"]
    same = [feature(dim, "import") for dim in range(MOST_CONTROLS + 1)]
    document = explainer(*same, feature(99, "try"))[0].group([0])[0]
    assert document["control_dim"] is None  # the one of other words is too far away


def test_beside_the_score_stands_what_counting_scores():
    odd = feature(1, "import")
    scored = [context._replace(texts=["x", " def", " import", " y"]) for context in odd.scored]
    document = explainer(odd._replace(scored=scored))[0].group([0])[0]
    assert document["counting"] < 0 and document["score"] < 0  # both know `import`, it fires on `def` there
    assert document["tokens"] == ["def"]  # of what is scored
    assert explainer(odd)[0].group([0])[0]["counting"] == 1.0


def test_shown_and_scored_are_kept_apart():
    document = explainer(feature(1, "import"))[0].group([0])[0]
    assert [one["row"] for one in document["shown"]] == [10, 11, 12]
    assert [one["row"] for one in document["scored"]] == [15, 16, 17]
    assert document["scored"][0] == {"row": 15, "text": "x import def y", "marks": [[1, 8]]}
    assert document["simulated"] == [[0.0, 1.0, 0.0, 0.0]] * 3
    assert document["tokens"] == ["import"] and document["promotes"] == ["x"]


def test_a_silent_feature_has_no_score_and_says_why():
    silent = feature(3, "nowhere")
    document = explainer(silent._replace(scored=[]), feature(1, "import"))[0].group([0])[0]
    assert document["score"] is document["control"] is document["counting"] is document["interval"] is None
    assert "no context to score on" in document["score_reason"] == document["control_reason"]
    document = explainer(silent._replace(shown=[], judging=[]))[0].group([0])[0]
    assert document["interpretation"] == "" and document["explained_by"] is None
    assert "no explanation" in document["score_reason"]


def test_detection_and_fuzzing_are_measured_when_asked_for():
    wide = feature(1, "import")
    wide = wide._replace(scored=wide.scored * 4, hard=[context._replace(
        texts=["x", "z"], values_T=torch.zeros(2)) for context in wide.scored * 4])  # fmt: skip
    assert "detection" not in explainer(wide, scores="simulation")[0].group([0])[0]
    document = explainer(wide)[0].group([0])[0]
    assert document["detection"] == 1.0 and 0 <= document["fuzzing"] <= 1


def test_progress_is_told_for_each_thing_that_is_done():
    told = []
    writer = Writer("the word y")
    plan = Plans(unsure(feature(1, "import")), unsure(feature(2, "try")))
    one = Explainer(plan, writer, Literal(writer), lambda what, count=1: told.append((what, count)))
    one.group([0, 1])
    assert told == [("written", 2), ("written", 2), ("explained", 1), ("explained", 1)] + [("scored", 1)] * 2
