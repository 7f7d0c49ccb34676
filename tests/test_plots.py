"""What the pictures show, read off the figures before they are written."""

import json
import math

import pytest
import torch

from sae import plots
from sae.training import sweep


@pytest.fixture
def figures(monkeypatch):
    """The axes of each picture drawn, by name."""
    found = {}
    monkeypatch.setattr(plots, "_save", lambda path, figure: found.update({path.name: figure.axes}))
    return found


def curves(axes):
    """{label: [(x, y), ...]}"""
    return {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in axes.lines}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_histogram_counts_the_dead_apart(figures, tmp_path):
    frequency = torch.tensor([-math.inf, -math.inf, -3.0, -1.5, -1.0])
    plots.frequency_histogram(tmp_path / "f.png", frequency, "title", (-2.0, -0.5))
    (axes,) = figures["f.png"]
    bars, band = axes.patches[:-1], axes.patches[-1].get_bbox()
    assert sum(bar.get_height() for bar in bars) == 3
    assert (band.x0, band.x1) == (-2.0, -0.5)
    assert legend(axes) == ["3 alive, 2 dead", "band -2 to -0.5"]
    assert axes.get_title() == "title"


def test_curves_of_training_and_of_held_out_contexts(figures, tmp_path):
    log = {"event": "log", "tokens": 8, "loss": 5.0, "mse": 4.0, "l1": 1.0, "l0": 3.0}
    judged = {
        "event": "checkpoint", "tokens": 16, "l0": 2.0, "explained_variance": 0.5, "loss_recovered": None,
        "dead_share": 0.25, "ce": 1.0, "ce_sae": 2.0, "ce_zero": 6.0,
    }  # fmt: skip
    plots.loss_curves(tmp_path / "l.png", [log, judged, {"event": "resample", "tokens": 12}], "title")
    loss, l0, shares, entropy = map(curves, figures["l.png"])
    revived = {label: line for label, line in loss.items() if label.startswith("_")}
    assert [[x for x, _ in line] for line in revived.values()] == [[12, 12]]
    wanted = {"loss": [(8, 5)], "squared error": [(8, 4)], "l1 x sum of activations": [(8, 1)]}
    assert loss == wanted | revived
    assert l0["L0, training"] == [(8, 3)] and l0["L0, held out"] == [(16, 2)]
    assert shares["explained variance"] == [(16, 0.5)] and shares["dead share"] == [(16, 0.25)]
    assert math.isnan(shares["loss recovered"][0][1])  # a gap
    names = ("as it is", "with the autoencoder", "with zeros")
    assert [entropy[name] for name in names] == [[(16, 1)], [(16, 2)], [(16, 6)]]
    assert [axes.get_yscale() for axes in figures["l.png"]] == ["log", "log", "linear", "linear"]


def test_a_sweeps_picture_has_the_newest_figures_of_each_run(figures, tmp_path, capsys):
    class Folder:
        def __init__(self, name):
            self.path, self.config = tmp_path / name, dict.fromkeys(sweep.SWEPT)

        def metrics(self):
            for batch in (30, 60):
                known = {
                    "l0": 0.0 if self.path.name == "silent" else batch / 10,
                    "explained_variance": batch / 100,
                    "loss_recovered": None,
                }
                more = {"loss_recovered_interval": None, "dead_share": 0.0}
                yield {"event": "checkpoint", "batch": batch, "tokens": 8 * batch} | known | more

    sweep.write(tmp_path, [Folder("one"), Folder("other"), Folder("silent")])
    assert not capsys.readouterr().err
    variance, recovered, _dead = figures["sweep.png"]
    assert variance.collections[0].get_offsets().tolist() == [[6.0, 0.6]] * 2
    assert [text.get_text() for text in variance.texts] == ["one", "other"]  # 0 has no place on a log axis
    assert not recovered.texts  # not known
    lines = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {
        "batch", "tokens", "folder", "l1_coefficient", "learning_rate", "dict_vec_size", "k", "target_l0",
        "l0", "explained_variance", "loss_recovered", "loss_recovered_interval", "dead_share",
    }  # fmt: skip
    assert [(line["batch"], line["folder"]) for line in lines] == [
        (batch, name) for batch in (30, 60) for name in ("one", "other", "silent")
    ]
