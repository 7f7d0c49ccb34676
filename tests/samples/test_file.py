import math

import pytest
import torch

from sae import InputError
from sae.samples import RANDOM, TOP, Samples, load_samples, only, save_samples


def test_round_trip(tmp_path):
    samples = Samples(
        {"layer_id": 3}, "d", "a", 640, torch.tensor([-1.0, -math.inf]), torch.tensor([0]),
        torch.tensor([2.5]), torch.tensor([[4, -1]]), torch.ones(1, 2, 8, dtype=torch.float16),
        torch.tensor([[TOP, RANDOM]]).char(), torch.tensor([[7, -1]]), torch.tensor([[5]]),
        torch.tensor([[6]]), torch.tensor([[0.5]]), torch.tensor([[-0.5]]),
    )  # fmt: skip
    save_samples(tmp_path / "s.pt", samples)
    back = load_samples(tmp_path / "s.pt")
    assert torch.load(tmp_path / "s.pt", weights_only=True)["features"].tolist() == [0]
    for name, value in samples._asdict().items():
        same = (
            torch.equal(value, getattr(back, name))
            if torch.is_tensor(value)
            else value == getattr(back, name)
        )
        assert same, name


def test_only_keeps_the_asked_features_in_ascending_order():
    F, K, T = 3, 2, 4
    samples = Samples(
        {}, "d", "a", 9, torch.zeros(8), torch.tensor([2, 5, 7]), torch.tensor([1.0, 2.0, 3.0]),
        torch.arange(F * K).view(F, K), torch.arange(F * K * T).view(F, K, T).half(),
        torch.zeros(F, K).char(), torch.arange(F)[:, None],
    )  # fmt: skip
    some = only(samples, [7, 2])
    assert some.features.tolist() == [2, 7]
    assert some.max_activation.tolist() == [1.0, 3.0]
    assert some.rows.tolist() == [[0, 1], [4, 5]]
    assert torch.equal(some.activations, samples.activations[[0, 2]])
    assert some.hard_rows.tolist() == [[0], [2]] and some.promoted is None
    assert len(some.log10_frequency) == 8
    with pytest.raises(InputError, match="3, 9 are not among them"):
        only(samples, [9, 2, 3])


def test_files_of_the_version_before_open(tmp_path):
    old = Samples({}, "d", "a", 9, torch.zeros(8), *[torch.zeros(1)] * 5)
    save_samples(tmp_path / "s.pt", old)
    assert set(torch.load(tmp_path / "s.pt", weights_only=True)) == set(Samples._fields[:10])
    assert load_samples(tmp_path / "s.pt").hard_rows is None
    assert only(load_samples(tmp_path / "s.pt"), [0]).promoted is None
