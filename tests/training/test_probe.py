"""Token classes of Python, and how well single features tell them apart."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from sae.activations import find_hookpoint
from sae.autoencoder import Autoencoder
from sae.models import load_model
from sae.training.evaluation import Judge
from sae.training.probe import CLASSES, probe_f1, token_classes

SOURCE = """import os  # é, a comment
\fclass Name(dict):
    def method(self):
        return "a ü string" + 3.5 if self else None
"""


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def test_token_classes(tokenizer):
    ids = tokenizer(SOURCE)["input_ids"]
    named = [
        (tokenizer.decode([one]).strip(), CLASSES[c] if c >= 0 else None)
        for one, c in zip(ids, token_classes(tokenizer, ids).tolist(), strict=True)
    ]
    for pair in [
        ("import", "keyword"), ("os", "name"), ("comment", "comment"), ("#", "comment"), ("class", "keyword"),
        ("Name", "name"), ("def", "keyword"), ("self", "name"), ("return", "keyword"), ("string", "string"),
        ("3", "number"), ("+", "operator"), ("None", "keyword"), ("", None),
    ]:  # fmt: skip
        assert pair in named, pair
    assert {c for text, c in named if not text} == {None}
    assert {c for text, c in named if text == "if"} == {"keyword"}


@pytest.mark.parametrize("rest", ["'''never closed import", "if x:\n        y\n    import"])
def test_what_is_no_python_has_no_class(tokenizer, rest):
    ids = tokenizer(f"x = 1\n{rest}")["input_ids"]
    classes = token_classes(tokenizer, ids).tolist()
    assert CLASSES[classes[0]] == "name"
    assert classes[-1] == -1


def test_probe_f1_by_hand():
    """Two classes have enough tokens. The best feature on the first half is scored on the second."""
    tokens_2C = torch.zeros(2, len(CLASSES) + 1)
    tokens_2C[:, 0], tokens_2C[:, 1], tokens_2C[:, -1] = 10, 20, 60
    tokens_2C[:, 2] = torch.tensor([9.0, 90])  # too few in one half
    fired_2CF = torch.zeros(2, len(CLASSES) + 1, 2)
    fired_2CF[0, 0] = torch.tensor([10.0, 5])
    fired_2CF[1, 0] = torch.tensor([5.0, 10])  # here feature 1 would be the better one
    fired_2CF[:, 1] = torch.tensor([0.0, 20])
    fired_2CF[1, -1] = torch.tensor([3.0, 6])
    first = 2 * 5 / (5 + 3 + 10)
    second = 2 * 20 / (10 + 20 + 6 + 20)
    assert probe_f1(fired_2CF, tokens_2C) == pytest.approx((first + second) / 2)
    assert probe_f1(fired_2CF, tokens_2C * 0) is None


def test_features_that_are_the_classes_score_one(tiny_llama):
    """An autoencoder that reads the class off planted activations, through the whole Judge."""
    model = load_model(tiny_llama, "cpu", "float32")
    module, _ = find_hookpoint(model, "model.layers.{}.mlp", 1)
    rng = torch.Generator().manual_seed(0)
    ids_MT = torch.randint(0, 49152, (8, 60), generator=rng)
    classes_MT = torch.randint(-1, 6, (8, 60), generator=rng)
    handle = module.register_forward_hook(lambda _mod, _in, out: torch.eye(32)[classes_MT[: len(out)] % 7])
    ae = Autoencoder(32, 32)
    ae.W_enc.data, ae.W_dec.data = torch.eye(32), torch.eye(32)
    judge = Judge(model, module, ids_MT, np.arange(8), classes_MT)
    assert judge.figures([ae])[0]["probe_f1"] == 1
    ae.W_enc.data = ae.W_enc.data.roll(3, dims=1)
    assert judge.figures([ae])[0]["probe_f1"] == 1
    ae.W_enc.data[:, :] = 1.0
    assert judge.figures([ae])[0]["probe_f1"] < 0.5
    handle.remove()
