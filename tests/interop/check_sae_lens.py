"""`make interop`: the exported folder in the real sae-lens package (a venv of its own, with torch first).

    python -m venv .venv-interop
    .venv-interop/bin/pip install torch==2.13.0 && .venv-interop/bin/pip install sae-lens==6.54.12
    .venv-interop/bin/python tests/interop/check_sae_lens.py

For each layer type and each architecture, with and without normalisation: SAELens' features and
reconstructions of real activations equal ours bit for bit; and its own hooks, found through the metadata
alone, see what ours see.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(ROOT))

import sae_lens  # noqa: E402
import torch  # noqa: E402
from sae_lens.load_model import load_model as sae_lens_model  # noqa: E402

from sae.activations import activations_at, find_hookpoint  # noqa: E402
from sae.autoencoder import ARCHITECTURES, Autoencoder, load_checkpoint, save_checkpoint  # noqa: E402
from sae.models import load_model, load_tokenizer  # noqa: E402

MODEL = str(ROOT / "inputs" / "smollm2")
HOOKPOINTS = {
    "mlp_activations": "model.layers.{}.mlp.act_fn",
    "mlp_sublayer": "model.layers.{}.mlp",
    "attn_sublayer": "model.layers.{}.self_attn",
    "residual": "model.layers.{}",
}
LAYER = 10
PRECISION = {"dtype": torch.float32}


def a_checkpoint(path, layer_type, hookpoint, width, normalize, architecture):
    """A checkpoint whose biases matter, and whose features fire, but not all."""
    rng, k = torch.Generator().manual_seed(0), 32 if architecture == "topk" else None
    autoencoder = Autoencoder(width, 4 * width, normalize, rng, None, architecture, k).requires_grad_(False)
    autoencoder.b_enc.copy_(0.1 * torch.randn(4 * width, generator=rng))
    autoencoder.b_dec.copy_(0.1 * torch.randn(width, generator=rng))
    if architecture in ("batchtopk", "jumprelu"):
        autoencoder.threshold.copy_(0.3 * torch.rand(4 * width, generator=rng))
    if not normalize:
        autoencoder.factor = 1.5  # as --scale_dataset finds one: what is written knows nothing of it
    config = {
        "act_vec_size": width, "dict_vec_size": 4 * width, "layer_id": LAYER, "layer_type": layer_type,
        "hookpoint": hookpoint, "model_name": MODEL, "normalize_dataset": normalize, "min_tokens": 64,
        "architecture": architecture, "k": k,
    }  # fmt: skip
    save_checkpoint(path, config, autoencoder, torch.full((4 * width,), -1.0))


def check(folder, x_ND, *what):
    """The export of one checkpoint as SAELens opens it; returns it and a line about it."""
    path, out = Path(folder) / "1.pt", Path(folder) / "out"
    a_checkpoint(path, *what)
    command = [sys.executable, "-m", "sae.export", str(path), str(out), "--format", "sae_lens"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    ours = load_checkpoint(path).autoencoder
    # The same storage order for both: a matrix product's last bit depends on it.
    ours.W_enc.data = ours.W_enc.data.contiguous()
    theirs = sae_lens.SAE.load_from_disk(out)
    features_NF = theirs.encode(x_ND)
    assert torch.equal(features_NF, ours.features(x_ND)), "features differ"
    assert torch.equal(theirs.decode(features_NF), ours(x_ND)), "reconstructions differ"
    share = float((features_NF > 0).float().mean())
    assert 0.003 < share < 0.8, "the check needs features that fire"
    return theirs, f"{what[-1]}, normalize_dataset {what[3]}: equal, {share:.0%} of features fire"


def main():
    ids_BT = load_tokenizer(MODEL)(
        "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n",
        return_tensors="pt",
    )["input_ids"]
    model = load_model(MODEL, dtype="float32")
    for layer_type, template in HOOKPOINTS.items():
        module, hookpoint = find_hookpoint(model, template, LAYER)
        acts_BTD = activations_at(model, module, ids_BT)
        for architecture, normalize in itertools.product(ARCHITECTURES, (False, True)):
            with tempfile.TemporaryDirectory() as folder:
                width = acts_BTD.shape[-1]
                theirs, line = check(
                    folder, acts_BTD.flatten(0, 1), layer_type, hookpoint, width, normalize, architecture
                )
                print(f"{layer_type}, {line}")
        about = theirs.cfg.metadata
        hooked = sae_lens_model(about.model_class_name, about.model_name, "cpu", {"dtype": torch.float32})
        _, cache = hooked.run_with_cache(ids_BT, names_filter=[about.hook_name])
        assert torch.equal(cache[about.hook_name], acts_BTD), "SAELens hooks another module"
    print(f"sae-lens {sae_lens.__version__}, torch {torch.__version__}: all equal")


if __name__ == "__main__":
    main()
