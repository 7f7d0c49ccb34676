"""A sampling run: what its flags need, refused early, and the looks it takes at contexts of the dataset."""

from pathlib import Path
from typing import NamedTuple

import torch

from sae import InputError, cli
from sae.activations import activation_width, activations_at, find_hookpoint, prefetch
from sae.artifacts import check_origin, check_writable
from sae.autoencoder import Checkpoint, load_checkpoint
from sae.models import check_vocabulary, load_model, model_fingerprint, skeleton
from sae.samples.look import encode_in_pieces
from sae.tokens import check_tokenizer, open_dataset, read_contexts

# The flags that decide which samples come out, beside the seed.
OWN_FLAGS = (
    "num_samples", "log_freq_lower", "log_freq_upper", "num_top", "num_spread", "num_random", "batch_size",
    "autoencoder_path",
)  # fmt: skip


class Run(NamedTuple):
    """The inputs of a run; `config` is the checkpoint's."""

    dataset: object  # datasets.Dataset
    info: dict
    checkpoint: Checkpoint
    model: torch.nn.Module
    module: torch.nn.Module  # of the model, at the hookpoint
    batch_size: int

    @property
    def context_tokens(self):
        """T: the tokens of a context, as the autoencoder was trained."""
        return self.checkpoint.config.get("num_tokens") or self.info["min_tokens"]

    def config(self, seed, **flags):
        """The checkpoint's config and the run's own values; two names are taken and get a prefix."""
        own = {name: flags[name] for name in OWN_FLAGS}
        dtype = str(self.model.dtype).removeprefix("torch.")
        return self.checkpoint.config | own | {"samples_seed": seed, "samples_dtype_llm": dtype}

    def rows(self, num_samples, rng):
        """Dataset rows [N] drawn without replacement, ascending, and the document [N] of each."""
        rows_N = torch.randperm(len(self.dataset), generator=rng)[:num_samples].sort().values
        documents = self.dataset.with_format("numpy", columns=["document"])[rows_N.tolist()]["document"]
        return rows_N, torch.as_tensor(documents)

    def look(self, rows_N, contexts_N):
        """Stream the contexts `contexts_N` (places in `rows_N`) by batches: contexts [B], and its pieces."""
        skip = self.checkpoint.config.get("skip_positions", 0)
        batches = read_contexts(self.dataset, rows_N[contexts_N], self.batch_size, self.context_tokens)
        acts = (activations_at(self.model, self.module, ids_BT) for ids_BT in batches)
        if self.model.device != self.checkpoint.autoencoder.b_enc.device:
            acts = prefetch(acts)
        for contexts_B, acts_BTD in zip(contexts_N.split(self.batch_size), acts, strict=True):
            yield contexts_B, encode_in_pieces(self.checkpoint.autoencoder, contexts_B, acts_BTD[:, skip:])


def prepare(
    num_samples, dataset_path, autoencoder_path, save_path, target_model_name, target_model_device,
    autoencoder_device, log_freq_upper, log_freq_lower, batch_size, dtype_llm,
    allow_other_tokenizer=False, **_others,
):  # fmt: skip
    """The inputs that the flags name; all that can be is refused before the weights of the LLM are read."""
    if log_freq_upper <= log_freq_lower:
        raise InputError(
            f"--log_freq_upper above --log_freq_lower needed, got {log_freq_upper:g} and {log_freq_lower:g}"
        )
    check_writable("--save_path", save_path)
    if Path(save_path).suffix == ".png":
        raise InputError(f"--save_path needs the name of a file (.pt), got {save_path}")
    llm_device, device = cli.default_devices()
    llm_device = cli.check_device("--target_model_device", target_model_device or llm_device)
    device = cli.check_device("--autoencoder_device", autoencoder_device or device)
    dataset, info = open_dataset(dataset_path)
    if num_samples > len(dataset):
        most = f"{len(dataset)} (the contexts of {dataset_path})"
        raise InputError(f"num_samples of at most {most} needed, got {num_samples}")
    checkpoint = load_checkpoint(autoencoder_path, device)
    config = checkpoint.config
    made_from = config.get("dataset_fingerprint")
    check_origin(f"the autoencoder {autoencoder_path}", made_from, info["fingerprint"], dataset_path)
    name = target_model_name or config["model_name"]
    check_target(config, name, info)
    check_tokenizer(info, name, allow_other_tokenizer)
    model = load_model(name, llm_device, dtype_llm)
    module, _ = find_hookpoint(model, config["hookpoint"], config["layer_id"])
    return Run(dataset, info, checkpoint, model, module, batch_size)


def check_target(config, name, info):
    """Refuse another model than the checkpoint's, naming both, and one without embeddings for the dataset.

    The same model may lie elsewhere. Checkpoints of version 0.1 do not know its fingerprint: there it counts
    as another one when the last part of its name differs, or its width at the hookpoint.
    """
    made_from, known = config["model_name"], config.get("model_fingerprint")
    if known:
        same = model_fingerprint(name) == known
    else:
        same = Path(name).name == Path(made_from).name or Path(name).resolve() == Path(made_from).resolve()
    if not same:
        raise InputError(f"the model of the autoencoder ({made_from}) needed, got {name}")
    model = skeleton(name)
    check_vocabulary(model.config, info)
    module, hookpoint = find_hookpoint(model, config["hookpoint"], config["layer_id"])
    width = activation_width(model, module)
    if width != config["act_vec_size"]:
        raise InputError(
            f"the model of the autoencoder ({made_from}, act_vec_size {config['act_vec_size']}) needed, "
            f"{name} is {width} wide at {hookpoint}"
        )
