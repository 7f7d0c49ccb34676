"""The autoencoder: its maths in four architectures, and its checkpoint on disk.

    relu       f = max(pre, 0)                    Bricken et al. 2023, "Towards Monosemanticity", appendix
    topk       f = the k largest of max(pre, 0)   Gao et al. 2024, arXiv 2406.04093
    batchtopk  f = pre where pre > threshold      Bussmann et al. 2024, arXiv 2412.06410
    jumprelu   f = pre where pre > threshold      Rajamanoharan et al. 2024, arXiv 2407.14435

BatchTopK keeps the k N largest of a batch of N rows while it trains; the threshold that training tracked
takes their place here, so that a row's features never depend on the other rows.
Dims: N rows, D act_vec_size, F dict_vec_size.
"""

from typing import NamedTuple

import torch
from torch import nn

from sae import InputError
from sae.artifacts import fingerprint, load_pt, save_pt
from sae.processes import ALONE

ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu")
# Which dim of a parameter features are.
FEATURES = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "b_dec": None, "threshold": 0}
CONFIG_KEYS = ("act_vec_size", "dict_vec_size", "layer_id", "layer_type", "hookpoint", "model_name")


class Autoencoder(nn.Module):
    """Autoencoder with unit-norm dictionary rows: W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D].

    batchtopk and jumprelu have a threshold [F], never negative; topk and batchtopk have a k. `normalize`
    scales every row to L2 norm sqrt(D) on the way in and back on the way out; `factor` does the same by one
    number for all rows, and is 1 in whatever was read from a checkpoint.

    Of several processes (`here`) each holds its share of the features, F then; `decode` adds up over all.
    Every one has to make the same calls, on the same rows.
    """

    def __init__(
        self, act_vec_size, dict_vec_size, normalize=False, rng=None, device=None, architecture="relu",
        k=None, here=ALONE,
    ):  # fmt: skip
        super().__init__()
        self.normalize, self.factor, self.architecture, self.k = normalize, 1.0, architecture, k
        self.here = here
        rows_FD = _directions(dict_vec_size, act_vec_size, rng, here.share(dict_vec_size)).to(device)
        self.W_dec = nn.Parameter(rows_FD)
        # Feature-major storage behind the [D, F] shape: a feature's encoder lies together, as its decoder.
        self.W_enc = nn.Parameter(rows_FD.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(len(rows_FD), device=device))
        self.b_dec = nn.Parameter(torch.zeros(act_vec_size, device=device))
        if architecture in ("batchtopk", "jumprelu"):
            # Only jumprelu learns it by gradients.
            self.threshold = nn.Parameter(torch.zeros_like(self.b_enc), architecture == "jumprelu")

    def encode(self, x_ND):
        """The product runs in the dtype of W_enc, which whoever uses the autoencoder may lower."""
        pre_NF = (x_ND - self.b_dec).to(self.W_enc.dtype) @ self.W_enc
        return self.activate(pre_NF.to(self.b_enc.dtype) + self.b_enc)

    def activate(self, pre_NF):
        """Pre-activations -> feature activations, each row for itself."""
        if self.architecture == "topk":
            return largest(pre_NF, self.k, self.here)
        f_NF = torch.relu(pre_NF)
        return f_NF if self.architecture == "relu" else f_NF * (pre_NF > self.threshold)

    def decode(self, f_NF):
        return self.here.total(f_NF @ self.W_dec) + self.b_dec

    def scale(self, x_ND):
        """[N, 1]: what each row is multiplied by before encoding. Zeros stay zeros."""
        if not self.normalize:
            return torch.full_like(x_ND[:, :1], self.factor)
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


def _directions(features, width, rng, own):
    """Random rows of unit norm [own, D] out of [features, D]: the same whatever the share is.

    torch draws 16 numbers at a time: blocks of a multiple of it are what all at once would be.
    """
    rows, starts = [], range(0, features, 4096)
    for start, end in zip(starts, (*starts[1:], features), strict=True):
        block_FD = torch.randn(end - start, width, generator=rng)
        block_FD = block_FD[max(own.start - start, 0) : max(own.stop - start, 0)]
        rows.append(nn.functional.normalize(block_FD, dim=1))
    return torch.cat(rows)


def largest(pre_NF, k, here):
    """The k largest of each row over all processes' features; what is below them, or negative, becomes 0."""
    kept = pre_NF.topk(min(k, pre_NF.shape[1]), dim=1, sorted=False)
    values_NK = kept.values
    if here.count > 1:
        values_NK = values_NK * (values_NK >= least(values_NK, k, here))
    return torch.zeros_like(pre_NF).scatter_(1, kept.indices, values_NK.relu())


def least(largest_NK, k, here):
    """[N, 1]: the smallest of the k largest of each row, out of every process's own k largest."""
    if here.count > 1:
        own_NK = nn.functional.pad(largest_NK, (0, k - largest_NK.shape[1]), value=-torch.inf)
        largest_NK = here.join(own_NK, 1).topk(k, dim=1, sorted=False).values
    return largest_NK.amin(1, keepdim=True)


class Checkpoint(NamedTuple):
    config: dict
    autoencoder: Autoencoder
    log10_frequency: torch.Tensor  # [F], over config's frequency_tokens; -inf where a feature never fired
    fingerprint: str  # of the file


def save_checkpoint(path, config, autoencoder, log10_frequency):
    """Write `<trained_batches>.pt`; `config`: plain values named after the flags (CONFIG_KEYS at least)."""
    save_pt(path, checkpoint(config, autoencoder.state_dict(), autoencoder.factor, log10_frequency))


def checkpoint(config, weights, factor, log10_frequency):
    """What `save_checkpoint` writes. weights: the state_dict of an autoencoder with all features.

    Readers need not know of a `factor` c: f(c x) = c max((x - b_dec / c) W_enc + b_enc / c, 0), and so the
    biases and the threshold are divided by it. Activations then are in units of the LLM's.
    """
    state = {name: value.cpu().contiguous() for name, value in weights.items()}
    if factor != 1:
        config = config | {"scale_factor": factor}
        state |= {name: state[name] / factor for name in state if not name.startswith("W_")}
    return {"config": config, "state_dict": state, "log10_frequency": log10_frequency.cpu()}


def load_checkpoint(path, device="cpu"):
    """Read what `save_checkpoint` wrote; the autoencoder is on `device` and needs no gradients."""
    content = load_pt(path, "an autoencoder checkpoint", ("config", "state_dict", "log10_frequency"))
    config, state = content["config"], content["state_dict"]
    missing = [key for key in CONFIG_KEYS if key not in config]
    if missing:
        raise InputError(f"an autoencoder checkpoint needed, the config of {path} lacks {', '.join(missing)}")
    architecture = config.get("architecture", "relu")
    if architecture not in ARCHITECTURES:
        raise InputError(f"architecture {', '.join(ARCHITECTURES)} needed, {path} has {architecture}")
    sizes = config["act_vec_size"], config["dict_vec_size"]
    normalize, k = config.get("normalize_dataset", False), config.get("k")
    autoencoder = Autoencoder(*sizes, normalize, None, device, architecture, k)
    try:
        autoencoder.requires_grad_(False).load_state_dict(state)
    except RuntimeError as err:
        needed = "an autoencoder checkpoint needed"
        raise InputError(f"{needed}, the weights of {path} do not fit: {err}") from err
    return Checkpoint(config, autoencoder, content["log10_frequency"], fingerprint(path))
