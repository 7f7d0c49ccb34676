"""What an explaining run says: its bar, its forecast, its last line."""

from types import SimpleNamespace

import pytest

from sae.explanations.explain import Settings
from sae.explanations.run import Bar, Work, explained, forecast, summary


def document(score, control, interval=(0.2, 0.6), hand="counted"):
    return {"score": score, "control": control, "interval": interval, "explained_by": hand}


def test_the_last_line_counts_what_clearly_beats_its_control_and_who_explained():
    documents = [
        document(0.5, 0.1), document(0.1, 0.2), document(None, None, None, None),
        document(0.3, 0.25, hand="text"), document(0.4, None),
    ]  # fmt: skip
    said = summary(documents, 2, 60.0)
    assert said.startswith("5 features explained: median score 0.35, median control 0.20, 67% beat")
    assert "beat their control (33% by more than their interval)" in said
    assert "explained by text 1, counted 3; 2 in 60 s, 2.0 features/minute" in said
    assert "no score is defined" in summary(documents[2:3], 1, 1.0)


class Plan:
    def __init__(self, *groups, **chosen):
        self.groups, self.settings = groups, Settings()._replace(**chosen)
        self.count = sum(map(len, groups))


class Explainer:
    def group(self, places):
        return [{"dim": place} for place in places]

    def tokens_read(self):
        return 1_000_000


def test_the_bar_moves_within_a_group_and_never_back_or_beyond():
    plan, shown = Plan([0, 1], [2, 3], [4, 5], batch_size=2), []
    with Bar(plan, [1, 2], shown=False) as bar:
        bar.update = lambda step: (shown.append(step), setattr(bar, "n", bar.n + step))
        assert bar.n == 2  # the first group is done
        for _ in range(4):
            bar.step("written")
        assert bar.n == pytest.approx(3.0)  # half of the work on each of two
        bar.step("explained", 2)
        bar.step("scored", 2)
        assert bar.n == pytest.approx(4.0)
        bar.step("scored", 9)
        assert bar.n == 4 and min(shown) >= 0
        bar.reach(2)
        assert bar.n == 4
        bar.step("written")  # of the next group
        assert bar.n == pytest.approx(4.25)


def test_the_forecast_reckons_all_features_by_the_first_group(monkeypatch):
    clock = iter((0.0, 3600.0))
    monkeypatch.setattr("sae.explanations.run.time", SimpleNamespace(monotonic=lambda: next(clock)))
    said = forecast(Plan([0, 1], [2, 3], [4, 5], [6, 7]), Explainer())
    assert said == (
        "2 features took 500,000 tokens and 1800.0 s each: 8 would take 4.0 million tokens and 4.0 hours"
    )


def test_what_the_journal_holds_is_not_written_twice():
    work = Work(None, None, {"layer": 1}, {3: {}})
    assert work.new([{"dim": 3}, {"dim": 4}]) == [{"layer": 1, "dim": 4}]


class Here:
    def __init__(self, rank, count):
        self.rank, self.count = rank, count

    def everyone(self, value):
        return [value]

    def hand_out(self, items, work, stopping):
        return (work(item) for item in items)


def test_groups_are_handed_out_or_done_by_all():
    plan, never = Plan([0, 1], [2, 3], [4, 5]), lambda: False
    dims = lambda groups: [[document["dim"] for document in one] for one in groups]  # noqa: E731
    assert dims(explained(plan, [0, 2], Here(0, 1), "data", Explainer(), never)) == [[0, 1], [4, 5]]
    assert dims(explained(plan, [0, 1, 2], Here(1, 2), "data", Explainer(), never)) == [
        [0, 1],
        [2, 3],
        [4, 5],
    ]
    assert dims(explained(plan, [0, 1], Here(0, 2), "tensor", Explainer(), never)) == [[0, 1], [2, 3]]
    assert dims(explained(plan, [0, 1], Here(1, 2), "tensor", Explainer(), never)) == []
    assert dims(explained(plan, [0, 1, 2], Here(0, 2), "tensor", Explainer(), lambda: True)) == [[0, 1]]
