import numpy as np
import pytest
import torch
from torch.nn import functional

from sae import InputError
from sae.activations import activations_at, find_hookpoint
from sae.autoencoder import Autoencoder
from sae.models import load_model
from sae.training import evaluation
from sae.training.evaluation import Judge, _recovered, split_held_out


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


def kl_of(model, ids_BT, replace):
    """From its definition, over the predicted tokens."""
    with torch.no_grad():
        own = model(ids_BT).logits[:, :-1].double().softmax(-1)
        handle = model.model.layers[1].mlp.register_forward_hook(lambda _mod, _in, out: replace(out))
        other = model(ids_BT).logits[:, :-1].double().softmax(-1)
        handle.remove()
    return (own * (own / other).log()).sum(-1).mean().item()


@pytest.mark.parametrize("skip", [0, 2])
def test_against_the_obvious_way(hooked, ids_BT, skip, monkeypatch):
    monkeypatch.setattr(evaluation, "SLICE", 16)  # less than the rows of a batch
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
    want["kl"] = kl_of(model, ids_BT, put(out_ND))
    judge = Judge(model, module, ids_BT, np.arange(6), None, skip, batch_size=4)
    other = Autoencoder(32, 16, rng=torch.Generator().manual_seed(2))
    _, got = judge.figures([other, ae])
    assert (got["documents"], got["contexts"], got["probe_f1"]) == (6, 6, None)
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name


def test_a_perfect_autoencoder(hooked, ids_BT, capsys):
    model, module = hooked
    ae = Autoencoder(32, 64)
    ae.W_enc.data = torch.cat([torch.eye(32), -torch.eye(32)], dim=1)
    ae.W_dec.data = ae.W_enc.data.T.clone()
    (got,) = Judge(model, module, ids_BT, np.arange(6)).figures([ae])
    assert got["explained_variance"] == pytest.approx(1)
    assert got["ce_sae"] == pytest.approx(got["ce"])
    assert got["loss_recovered"] == pytest.approx(1, abs=1e-3)
    assert got["kl"] == pytest.approx(0, abs=1e-6)
    assert "judging" in capsys.readouterr().err


def test_the_divergence_is_that_of_the_llms_own_predictions_from_the_others():
    both = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    own, other = (torch.distributions.Categorical(logits=logits_BTV[:, :-1]) for logits_BTV in both)
    want_B = torch.distributions.kl_divergence(own, other).sum(1)
    assert evaluation._divergences(*both) == pytest.approx(want_B.tolist(), rel=1e-5)


def test_what_does_not_change_is_computed_once(hooked, ids_BT):
    """The second time a pass less: zeros in place say the same whatever the autoencoder is.

    Behind the contexts that the divergence is taken of, the LLM's own pass is not needed either.
    """
    model, module = hooked
    ids_MT = ids_BT[:, :3].repeat(20, 1)
    judge, passes = Judge(model, module, ids_MT, np.arange(120), batch_size=32), []
    handle = model.register_forward_hook(lambda _mod, _in, _out: passes.append(1))
    (first,) = judge.figures([ae := Autoencoder(32, 64)])
    assert len(passes) == 4 * 3
    with torch.no_grad():
        kl = kl_of(model, ids_MT[:64], lambda out: ae(out.flatten(0, 1)).view_as(out))
    assert first["kl"] == pytest.approx(kl, rel=2e-3)
    passes.clear()
    _, second = judge.figures([Autoencoder(32, 64), Autoencoder(32, 64)])
    handle.remove()
    assert len(passes) == 4 * 2 + 2
    assert {key: first[key] for key in ("ce", "ce_zero")} == {key: second[key] for key in ("ce", "ce_zero")}


def test_held_out_documents_are_drawn_from_all_over_and_not_trained_on():
    documents = np.repeat(np.arange(100), 50)
    training, held_out = split_held_out(documents, 256, seed=0)
    assert len(held_out) == 256
    drawn = set(documents[held_out])
    assert len(drawn) == 10 and min(drawn) < 33 and max(drawn) > 66
    assert set(documents[held_out[:64]]) == drawn  # those that the divergence is taken of
    assert not set(documents[training]) & drawn
    assert len(training) == 90 * 50
    # From a document not its first contexts but any, and about as many as from another.
    counts = np.unique(documents[held_out], return_counts=True)[1]
    assert counts.min() >= 22 and counts.max() == 26
    assert (np.bincount(held_out % 50, minlength=50) > 0).all()
    assert set(documents[split_held_out(documents, 256, seed=1)[1]]) != drawn


def test_held_out_contexts_of_many_short_documents_and_of_few():
    training, held_out = split_held_out(np.arange(10_000), 256, seed=0)
    assert (len(training), len(held_out)) == (9744, 256)
    training, held_out = split_held_out(np.array([0, 0, 1]), 256, seed=0)
    assert (training.tolist(), held_out.tolist()) == ([0, 1], [2])
    with pytest.raises(InputError, match="2 documents"):
        split_held_out(np.zeros(5, dtype=int), 256, seed=0)


def test_the_interval_of_loss_recovered_holds_the_truth():
    """Documents drawn from a population whose ratio is known: 95% of the intervals hold it."""
    rng = np.random.default_rng(0)
    held, tries = 0, 2000
    for _ in range(tries):
        gap_K = rng.gamma(3.0, 10.0, size=12)
        lost_K = 0.2 * gap_K + rng.normal(0, 1, 12) * np.sqrt(gap_K)
        got = _recovered(np.zeros(12), lost_K, gap_K)
        low, high = got["loss_recovered_interval"]
        assert low < got["loss_recovered"] < high
        held += low < 0.8 < high
    assert held / tries == pytest.approx(0.95, abs=0.015)
    assert _recovered(np.ones(2), np.ones(2), np.ones(2)) == dict.fromkeys(
        ("loss_recovered", "loss_recovered_interval")
    )


def test_cross_entropy_is_torchs(hooked, ids_BT):
    model, module = hooked
    with torch.no_grad():
        logits = model(ids_BT).logits[:, :-1].flatten(0, 1)
    want = functional.cross_entropy(logits, ids_BT[:, 1:].flatten()).item()
    (got,) = Judge(model, module, ids_BT, np.arange(6)).figures([Autoencoder(32, 64)])
    assert got["ce"] == pytest.approx(want, rel=1e-4)
