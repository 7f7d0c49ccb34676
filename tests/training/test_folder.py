"""The folder of a run: what is written when, and what happens when writing fails."""

import pytest
import torch

from sae import InputError
from sae.autoencoder import Autoencoder
from sae.training.folder import RunFolder
from sae.training.trainer import Trainer

FIGURES = {
    "l0": 1.0,
    "explained_variance": None,
    "loss_recovered": None,
    "loss_recovered_interval": None,
    "dead_share": 0.0,
    "ce": 1.0,
    "ce_sae": 2.0,
    "ce_zero": 3.0,
}


def rows(count, seed=1):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) * 3


def started(path):
    """A folder and its trainer after one batch of 8 rows."""
    config = {
        "batch_size_autoencoder": 8,
        "num_batches": 3,
        "model_name": "tiny",
        "hookpoint": "model.layers.1",
    }
    folder, trainer = RunFolder(path, config, resume=False), Trainer(Autoencoder(6, 20), 1e-2, 0.3)
    trainer.step(rows(8))
    folder.start(trainer)
    return folder, trainer


def test_a_broken_state_is_never_saved(tmp_path):
    folder, trainer = started(tmp_path)
    before = (tmp_path / "resume.pt").read_bytes()
    trainer.step(torch.full((8, 6), float("nan")))
    for save in (folder.save_resume, lambda trainer: folder.save_checkpoint(trainer, {})):
        with pytest.raises(InputError, match="batch 2 gave nan"):
            save(trainer)
    assert (tmp_path / "resume.pt").read_bytes() == before
    assert [path.name for path in tmp_path.glob("*.pt")] == ["resume.pt"]


def test_pictures_never_stop_a_run(tmp_path, capsys):
    """resume.pt is written before them, and what ails them is a line."""
    folder, trainer = started(tmp_path)
    (tmp_path / "images").write_text("a file where the folder of the pictures should be")
    trainer.step(rows(8))
    folder.save_checkpoint(trainer, FIGURES)
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["trainer"]["batch"] == 2
    lines = capsys.readouterr().err.split("\n")
    assert [line[:10] for line in lines if line] == ["no picture"] * 2


def test_a_picture_of_a_revival_before_the_first_line_of_the_log(tmp_path, capsys):
    folder, trainer = started(tmp_path)
    folder.append([{"event": "resample", "batch": 1, "tokens": 8}])
    folder.save_checkpoint(trainer, FIGURES | {"l0": 0.0})
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"1.png", "loss_curves.png"}
    assert capsys.readouterr().err == ""
