"""The autoencoder: its maths, and its checkpoint on disk.

Bricken et al. 2023, "Towards Monosemanticity", appendix. Dims: N rows, D act_vec_size, F dict_vec_size.
"""

from typing import NamedTuple

import torch
from torch import nn

from sae import InputError
from sae.artifacts import fingerprint, load_pt, save_pt

CONFIG_KEYS = ("act_vec_size", "dict_vec_size", "layer_id", "layer_type", "hookpoint", "model_name")


class Autoencoder(nn.Module):
    """ReLU autoencoder with unit-norm dictionary rows: W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D].

    `normalize` scales every row to L2 norm sqrt(D) on the way in and back on the way out.
    """

    def __init__(self, act_vec_size, dict_vec_size, normalize=False, rng=None, device=None):
        super().__init__()
        self.normalize = normalize
        rows_FD = torch.randn(dict_vec_size, act_vec_size, generator=rng)
        rows_FD = nn.functional.normalize(rows_FD, dim=1).to(device)
        self.W_dec = nn.Parameter(rows_FD)
        # Feature-major storage behind the [D, F] shape: a feature's encoder lies together, as its decoder.
        self.W_enc = nn.Parameter(rows_FD.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(dict_vec_size, device=device))
        self.b_dec = nn.Parameter(torch.zeros(act_vec_size, device=device))

    def encode(self, x_ND):
        return torch.relu((x_ND - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, f_NF):
        return f_NF @ self.W_dec + self.b_dec

    def scale(self, x_ND):
        """[N, 1]: what each row is multiplied by before encoding; 1 without `normalize`. Zeros stay zeros."""
        if not self.normalize:
            return torch.ones_like(x_ND[:, :1])
        norm_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
        return x_ND.shape[1] ** 0.5 / norm_N1.clamp_min(torch.finfo(x_ND.dtype).tiny ** 0.5)

    def features(self, x_ND):
        """Activations straight from the LLM (any float dtype) -> feature activations [N, F], float32."""
        x_ND = x_ND.to(self.b_dec)
        return self.encode(x_ND * self.scale(x_ND))

    def forward(self, x_ND):
        """Activations straight from the LLM -> their reconstruction, in the same scale: [N, D] float32."""
        x_ND = x_ND.to(self.b_dec)
        scale_N1 = self.scale(x_ND)
        return self.decode(self.encode(x_ND * scale_N1)) / scale_N1


class Checkpoint(NamedTuple):
    config: dict
    autoencoder: Autoencoder
    log10_frequency: torch.Tensor  # [F], -inf where a feature never fired since the checkpoint before
    fingerprint: str  # of the file


def save_checkpoint(path, config, autoencoder, log10_frequency):
    """Write `<trained_batches>.pt`; `config`: plain values named after the flags (CONFIG_KEYS at least)."""
    state = {name: value.contiguous().cpu() for name, value in autoencoder.state_dict().items()}
    save_pt(path, {"config": config, "state_dict": state, "log10_frequency": log10_frequency.cpu()})


def load_checkpoint(path, device="cpu"):
    """Read what `save_checkpoint` wrote; the autoencoder is on `device` and needs no gradients."""
    content = load_pt(path, "an autoencoder checkpoint", ("config", "state_dict", "log10_frequency"))
    config, state = content["config"], content["state_dict"]
    missing = [key for key in CONFIG_KEYS if key not in config]
    if missing:
        raise InputError(f"an autoencoder checkpoint needed, the config of {path} lacks {', '.join(missing)}")
    autoencoder = Autoencoder(
        config["act_vec_size"], config["dict_vec_size"], config.get("normalize_dataset", False), device=device
    )
    try:
        autoencoder.load_state_dict(state)
    except RuntimeError as err:
        raise InputError(
            f"an autoencoder checkpoint needed, the weights of {path} do not fit: {err}"
        ) from err
    return Checkpoint(
        config, autoencoder.requires_grad_(False), content["log10_frequency"], fingerprint(path)
    )
