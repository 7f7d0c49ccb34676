import numpy as np
import pytest
import torch
from torch.nn import functional

from sae import InputError
from sae.activations import activations_at, find_hookpoint
from sae.autoencoder import Autoencoder
from sae.models import load_model
from sae.training.evaluation import evaluate, split_held_out


@pytest.fixture
def hooked(tiny_llama):
    model = load_model(tiny_llama, "cpu", "float32")
    # So that the layer matters: with random weights as they are, zeroing it changes the loss by nothing.
    model.model.layers[1].mlp.down_proj.weight *= 1000
    return model, find_hookpoint(model, "model.layers.{}.mlp", 1)[0]


@pytest.fixture
def ids_BT():
    return torch.randint(0, 49152, (6, 12), generator=torch.Generator().manual_seed(0))


def loss_with(model, ids_BT, replace):
    """The obvious way: a forward hook, Hugging Face's own loss, one batch."""
    handle = model.model.layers[1].mlp.register_forward_hook(lambda _mod, _in, out: replace(out))
    try:
        with torch.no_grad():
            return model(ids_BT, labels=ids_BT).loss.item()
    finally:
        handle.remove()


@pytest.mark.parametrize("skip", [0, 2])
def test_against_the_obvious_way(hooked, ids_BT, skip):
    model, module = hooked
    ae = Autoencoder(32, 64, normalize=True, rng=torch.Generator().manual_seed(1))
    x_ND = activations_at(model, module, ids_BT)[:, skip:].reshape(-1, 32).clone()
    with torch.no_grad():
        out_ND, f_NF = ae(x_ND), ae.features(x_ND)

    def put(new_ND):
        def replace(out):
            out = out.clone()
            out[:, skip:] = new_ND.view(6, 12 - skip, 32)
            return out

        return replace

    ce, ce_sae, ce_zero = (
        loss_with(model, ids_BT, replace)
        for replace in (lambda out: out, put(out_ND), put(torch.zeros_like(x_ND)))
    )
    error, variance = ((x_ND - out_ND) ** 2).sum().item(), ((x_ND - x_ND.mean(0)) ** 2).sum().item()
    want = {
        "l0": (f_NF > 0).float().sum(1).mean().item(),
        "explained_variance": 1 - error / variance,
        "ce": ce, "ce_sae": ce_sae, "ce_zero": ce_zero, "loss_recovered": (ce_zero - ce_sae) / (ce_zero - ce),
    }  # fmt: skip
    got = evaluate(model, module, ae, [ids_BT[:4], ids_BT[4:]], skip)
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name


def test_a_perfect_autoencoder(hooked, ids_BT):
    model, module = hooked
    ae = Autoencoder(32, 64)
    ae.W_enc.data = torch.cat([torch.eye(32), -torch.eye(32)], dim=1)
    ae.W_dec.data = ae.W_enc.data.T.clone()
    got = evaluate(model, module, ae, [ids_BT])
    assert got["explained_variance"] == pytest.approx(1)
    assert got["ce_sae"] == pytest.approx(got["ce"])
    assert got["loss_recovered"] == pytest.approx(1, abs=1e-3)


def test_held_out_documents_are_not_trained_on():
    documents = np.repeat(np.arange(100), 20)
    training, held_out = split_held_out(documents)
    assert len(held_out) == 64
    assert held_out.tolist() == list(range(1936, 2000))
    assert not set(documents[training]) & set(documents[held_out])
    assert len(training) == 96 * 20
    training, held_out = split_held_out(np.array([0, 0, 1]))
    assert (training.tolist(), held_out.tolist()) == ([0, 1], [2])
    with pytest.raises(InputError, match="2 documents"):
        split_held_out(np.zeros(5, dtype=int))


def test_cross_entropy_is_torchs(hooked, ids_BT):
    model, module = hooked
    with torch.no_grad():
        logits = model(ids_BT).logits[:, :-1].flatten(0, 1)
    want = functional.cross_entropy(logits, ids_BT[:, 1:].flatten()).item()
    assert evaluate(model, module, Autoencoder(32, 64), [ids_BT])["ce"] == pytest.approx(want, rel=1e-4)
