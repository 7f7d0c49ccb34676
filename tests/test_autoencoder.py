import pytest
import torch

from sae import InputError
from sae.artifacts import fingerprint, save_pt
from sae.autoencoder import ARCHITECTURES, Autoencoder, load_checkpoint, save_checkpoint

CONFIG = {
    "act_vec_size": 4, "dict_vec_size": 6, "layer_id": 1, "layer_type": "mlp_sublayer",
    "hookpoint": "model.layers.1.mlp", "model_name": "m", "normalize_dataset": True,
}  # fmt: skip


def by_hand():
    autoencoder = Autoencoder(2, 2)
    autoencoder.W_enc.data = torch.eye(2)
    autoencoder.W_dec.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    return autoencoder


def test_encode_and_decode_by_hand():
    autoencoder = by_hand()
    assert autoencoder.encode(torch.tensor([[3.0, -1.0]])).tolist() == [[3.0, 0.0]]
    autoencoder.b_dec.data = torch.tensor([1.0, 1.0])
    autoencoder.b_enc.data = torch.tensor([0.5, 4.0])
    assert autoencoder.encode(torch.tensor([[3.0, -1.0]])).tolist() == [[2.5, 2.0]]
    assert autoencoder.decode(torch.tensor([[2.5, 2.0]])).tolist() == [[3.0, 3.5]]


def eye(architecture, k=None, threshold=()):
    autoencoder = Autoencoder(3, 3, architecture=architecture, k=k)
    autoencoder.W_enc.data = torch.eye(3)
    if threshold:
        autoencoder.threshold.data = torch.tensor(threshold)
    return autoencoder


def test_each_architecture_by_hand():
    """The same rows [3, -1, 1] and [2, 2.5, 0.5] through an encoder that changes nothing."""
    x_ND = torch.tensor([[3.0, -1.0, 1.0], [2.0, 2.5, 0.5]])
    assert eye("relu").encode(x_ND).tolist() == [[3, 0, 1], [2, 2.5, 0.5]]
    assert eye("topk", k=1).encode(x_ND).tolist() == [[3, 0, 0], [0, 2.5, 0]]
    assert eye("topk", k=3).encode(x_ND).tolist() == [[3, 0, 1], [2, 2.5, 0.5]]  # never below 0
    for architecture in ("batchtopk", "jumprelu"):
        f_NF = eye(architecture, threshold=[2.0, 0.0, 0.9]).encode(x_ND)
        assert f_NF.tolist() == [[3, 0, 1], [0, 2.5, 0]], architecture  # 2 is not above 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_has_the_same_features_in_any_company(architecture):
    autoencoder = Autoencoder(4, 9, rng=torch.Generator().manual_seed(0), architecture=architecture, k=2)
    if architecture in ("batchtopk", "jumprelu"):
        autoencoder.threshold.data.fill_(0.5)
    x_ND = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    whole_NF = autoencoder.features(x_ND)
    for row in (0, 7, 49):
        assert torch.equal(autoencoder.features(x_ND[row : row + 1])[0] > 0, whole_NF[row] > 0)
        torch.testing.assert_close(autoencoder.features(x_ND[row : row + 1])[0], whole_NF[row])
    assert not whole_NF.signbit().any()  # no -0 where nothing fires


def test_starts_with_unit_rows_and_tied_encoder():
    autoencoder = Autoencoder(5, 20, rng=torch.Generator().manual_seed(3))
    assert torch.allclose(autoencoder.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(autoencoder.W_enc, autoencoder.W_dec.T)
    assert not autoencoder.b_enc.any()
    assert not autoencoder.b_dec.any()
    again = Autoencoder(5, 20, rng=torch.Generator().manual_seed(3))
    assert torch.equal(again.W_dec, autoencoder.W_dec)


def test_normalize_scales_in_and_back_out():
    autoencoder = by_hand()
    autoencoder.normalize = True
    x_ND = torch.tensor([[30.0, 40.0], [0.0, 0.0]])  # norm 50 -> sqrt(2)
    scaled_ND = x_ND[:1] / 50 * 2**0.5
    assert torch.allclose(autoencoder.features(x_ND[:1]), autoencoder.encode(scaled_ND))
    assert torch.allclose(
        autoencoder(x_ND[:1]), autoencoder.decode(autoencoder.encode(scaled_ND)) * 50 / 2**0.5
    )
    torch.testing.assert_close(autoencoder.features(x_ND[:1] / 1e6), autoencoder.features(x_ND[:1]))
    assert torch.isfinite(autoencoder(x_ND)).all()
    assert autoencoder.features(x_ND.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpoint_round_trip(tmp_path, architecture):
    k = 2 if "topk" in architecture else None
    autoencoder, path = Autoencoder(4, 6, normalize=True, architecture=architecture, k=k), tmp_path / "7.pt"
    shapes = {"W_enc": (4, 6), "b_enc": (6,), "W_dec": (6, 4), "b_dec": (4,)}
    if architecture in ("batchtopk", "jumprelu"):
        autoencoder.threshold.data = torch.linspace(0, 0.5, 6)
        shapes["threshold"] = (6,)
    frequency = torch.tensor([-1.0, float("-inf"), -2, -3, -4, -5])
    config = CONFIG | {"architecture": architecture, "k": k}
    save_checkpoint(path, config, autoencoder, frequency)
    content = torch.load(path, weights_only=True)
    assert {name: tuple(value.shape) for name, value in content["state_dict"].items()} == shapes
    loaded = load_checkpoint(path)
    x_ND = torch.randn(3, 4)
    assert torch.equal(loaded.autoencoder(x_ND), autoencoder(x_ND))
    assert not any(parameter.requires_grad for parameter in loaded.autoencoder.parameters())
    assert loaded.config == config
    assert torch.equal(loaded.log10_frequency, frequency)
    assert loaded.fingerprint == fingerprint(path)


def test_a_checkpoint_of_version_0_1_opens(tmp_path):
    """It names no architecture, or relu, and no k."""
    autoencoder = Autoencoder(4, 6)
    save_checkpoint(tmp_path / "7.pt", CONFIG, autoencoder, torch.zeros(6))
    assert "architecture" not in CONFIG
    x_ND = torch.randn(3, 4)
    loaded = load_checkpoint(tmp_path / "7.pt").autoencoder
    plain = {name: value for name, value in CONFIG.items() if name != "normalize_dataset"}
    save_checkpoint(tmp_path / "8.pt", plain, autoencoder, torch.zeros(6))
    assert not load_checkpoint(tmp_path / "8.pt").autoencoder.normalize
    torch.testing.assert_close(loaded.features(x_ND), torch.relu(_scaled(x_ND) @ autoencoder.W_enc.detach()))


def _scaled(x_ND):
    return x_ND / x_ND.norm(dim=1, keepdim=True) * 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_factor_is_folded_into_the_weights(tmp_path, architecture):
    """Readers of the file get the same reconstructions and, in units of the LLM's, the same features."""
    config = CONFIG | {"normalize_dataset": False, "architecture": architecture, "k": 3}
    rng = torch.Generator().manual_seed(0)
    autoencoder = Autoencoder(4, 6, rng=rng, architecture=architecture, k=3).requires_grad_(False)
    for name, parameter in autoencoder.named_parameters():
        if not name.startswith("W_"):
            parameter.copy_(torch.linspace(0, 0.5, len(parameter)))
    autoencoder.factor = 8.0
    save_checkpoint(tmp_path / "7.pt", config, autoencoder, torch.zeros(6))
    loaded = load_checkpoint(tmp_path / "7.pt")
    x_ND = torch.randn(20, 4, generator=rng) / 8
    torch.testing.assert_close(loaded.autoencoder(x_ND), autoencoder(x_ND))
    torch.testing.assert_close(loaded.autoencoder.features(x_ND), autoencoder.features(x_ND) / 8)
    assert torch.equal(loaded.autoencoder.W_dec, autoencoder.W_dec)
    assert loaded.config["scale_factor"] == 8
    assert loaded.autoencoder.factor == 1


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "7.pt"
    save_checkpoint(path, CONFIG | {"dict_vec_size": 7}, Autoencoder(4, 6), torch.zeros(6))
    with pytest.raises(InputError, match="do not fit"):
        load_checkpoint(path)
    save_pt(path, {"config": {"act_vec_size": 4}, "state_dict": {}, "log10_frequency": torch.zeros(6)})
    with pytest.raises(InputError, match="lacks dict_vec_size"):
        load_checkpoint(path)
    save_pt(
        path,
        {"config": CONFIG | {"architecture": "gated"}, "state_dict": {}, "log10_frequency": torch.zeros(6)},
    )
    with pytest.raises(InputError, match=r"relu, topk, batchtopk, jumprelu needed, .* has gated"):
        load_checkpoint(path)
