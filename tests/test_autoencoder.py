import pytest
import torch

from sae import InputError
from sae.artifacts import fingerprint, save_pt
from sae.autoencoder import Autoencoder, load_checkpoint, save_checkpoint

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
    assert torch.isfinite(autoencoder(x_ND)).all()
    assert autoencoder.features(x_ND.bfloat16()).dtype == torch.float32


def test_checkpoint_round_trip(tmp_path):
    autoencoder, path = Autoencoder(4, 6, normalize=True), tmp_path / "7.pt"
    frequency = torch.tensor([-1.0, float("-inf"), -2, -3, -4, -5])
    save_checkpoint(path, CONFIG, autoencoder, frequency)
    content = torch.load(path, weights_only=True)
    assert {name: tuple(value.shape) for name, value in content["state_dict"].items()} == {
        "W_enc": (4, 6), "b_enc": (6,), "W_dec": (6, 4), "b_dec": (4,),
    }  # fmt: skip
    loaded = load_checkpoint(path)
    x_ND = torch.randn(3, 4)
    assert torch.equal(loaded.autoencoder(x_ND), autoencoder(x_ND))
    assert loaded.config == CONFIG
    assert torch.equal(loaded.log10_frequency, frequency)
    assert loaded.fingerprint == fingerprint(path)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "7.pt"
    save_checkpoint(path, CONFIG | {"dict_vec_size": 7}, Autoencoder(4, 6), torch.zeros(6))
    with pytest.raises(InputError, match="do not fit"):
        load_checkpoint(path)
    save_pt(path, {"config": {"act_vec_size": 4}, "state_dict": {}, "log10_frequency": torch.zeros(6)})
    with pytest.raises(InputError, match="lacks dict_vec_size"):
        load_checkpoint(path)
