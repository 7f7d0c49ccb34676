"""Load an LLM and its tokenizer: by hub name, from a folder, or from a .gguf file."""

import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

import torch

from sae import InputError
from sae.artifacts import is_missing

MODEL = "causal language model"
SAMPLES, SAMPLE_BYTES = 256, 1 << 16  # of each file of weights, for the fingerprint
GIT_LFS = b"version https://git-lfs"
POSITION_TABLE = re.compile(
    r"(wpe|embed_positions|position_embeddings|positions_embed|pos_encoding|pos_emb)(\.weight)?$"
)


def load_tokenizer(name, trust_remote_code=False):
    """The tokenizer of a model; `name` is a hub name, a folder or a .gguf file."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, "tokenizer", name, trust_remote_code)


def load_model(name, device="cpu", dtype="auto", trust_remote_code=False, **share):
    """The causal language model `name` on `device`, ready for inference (no gradients, no dropout).

    `dtype` is a torch.dtype or a name; "auto" is `fast_dtype(device)`. `share`: words for from_pretrained
    that have it load a part. Raises InputError where a weight is not in the files or has another shape there:
    transformers would go on with random numbers.
    """
    from transformers import AutoModelForCausalLM

    told = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # in `info`, instead of an error
    told |= {"dtype": pick_dtype(dtype, device)} | share
    model, info = _load(AutoModelForCausalLM, MODEL, name, trust_remote_code, **told)
    if info["mismatched_keys"]:
        weight, there, shape = min(info["mismatched_keys"])
        part = " in a process's share" if share else ""
        needed = f"{weight} of shape {list(shape)}{part} needed by the config of {name}"
        raise InputError(f"{needed}, got {list(there)}")
    if missing := sorted(info["missing_keys"]):
        lacks = f"{name} lacks {len(missing)}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        others = f"; it has {min(info['unexpected_keys'])} instead" if info["unexpected_keys"] else ""
        raise InputError(f"all weights of a {model.config.model_type} needed, {lacks}{others}")
    return model.to(device).eval().requires_grad_(False)


def skeleton(name, dtype="auto", trust_remote_code=False):
    """The model without weights, on device "meta": hookpoints, widths and sizes before anything is read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _load(AutoConfig, MODEL, name, trust_remote_code)
    needed = f"a {MODEL} needed, {name} is a {config.model_type}"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{needed}, with an encoder before its decoder")
    # The usual implementations of attention and experts look at values, which a meta tensor has not.
    plain = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
    options = plain | {"dtype": pick_dtype(dtype, "cpu"), "trust_remote_code": trust_remote_code}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **options)
    except Exception as err:  # a config can be wrong in as many ways as there are architectures
        raise InputError(f"{needed}: {_words(err)}") from err


def _load(auto_class, what, name, trust_remote_code, **options):
    """from_pretrained; whatever is wrong with the files ends in an InputError of one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    path, before = Path(name), logging.get_verbosity()
    if path.suffix == ".gguf":
        name, options["gguf_file"] = str(path.parent), path.name
    if is_missing(str(name)):
        raise InputError(f"{what} needed: {name} is no hub name, folder or .gguf that opens: no such folder")
    logging.set_verbosity_error()  # it prints tables of missing weights, the caller names them in a line
    try:
        return auto_class.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as err:  # transformers, tokenizers and safetensors raise a different type for each way
        raise _opens_not(what, path, err) from err
    finally:
        logging.set_verbosity(before)


def _opens_not(what, path, err):
    """The InputError for a model's folder, in words that say what helps, where that is known."""
    why = _words(err)
    if "trust_remote_code" in str(err):
        why = "it comes with Python code of its own, which runs with --trust_remote_code alone"
    elif "weights_only" in str(err):
        why = "its weights are more than plain tensors, and nothing is ever unpickled: safetensors needed"
    elif (path / "adapter_config.json").is_file():
        why = f"it is an adapter, to be merged into its model first (PEFT): {why}"
    for file in path.glob("*") if path.is_dir() else [path]:
        if file.is_file() and file.open("rb").read(len(GIT_LFS)) == GIT_LFS:
            why = f"{file.name} is only the pointer of Git LFS, `git lfs pull` fetches the file"
    return InputError(f"{what} needed: {path} is no hub name, folder or .gguf that opens: {why}")


def _words(err):
    text = " ".join(str(err).split()).partition(" Model type should be one of")[0]
    return f"{type(err).__name__}: {text[:300]}"


def _weights(name):
    """Paths of the files that hold a model's weights, the ones that transformers opens; read from the hub."""
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    quiet = {"_raise_exceptions_for_missing_entries": False}
    for weights in ("model.safetensors", "pytorch_model.bin"):
        if file := cached_file(name, weights, **quiet):
            return [file]
        if index := cached_file(name, f"{weights}.index.json", **quiet):
            return get_checkpoint_shard_files(name, index)[0]
    raise InputError(f"weights needed, {name} has no model.safetensors or pytorch_model.bin")


def model_fingerprint(name):
    """16 hex digits of a model's config and of samples of its weights, wherever it lies; takes no time."""
    from transformers.utils.hub import cached_file

    digest, files = hashlib.sha256(), [name]
    try:
        if Path(name).suffix != ".gguf":
            config, files = json.loads(Path(cached_file(name, "config.json")).read_text()), _weights(name)
            config = {key: config[key] for key in config.keys() - {"_name_or_path", "transformers_version"}}
            digest.update(json.dumps(config, sort_keys=True).encode())
        for file in files:
            size = Path(file).stat().st_size
            digest.update(str(size).encode())
            with open(file, "rb") as handle:
                for start in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                    handle.seek(start)
                    digest.update(handle.read(SAMPLE_BYTES))
    except InputError:
        raise
    except Exception as err:  # as many ways as in `_load`
        raise _opens_not(MODEL, Path(name), err) from err
    return digest.hexdigest()[:16]


def fast_dtype(device):
    """bfloat16 where the hardware multiplies it fast, else float32."""
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def pick_dtype(dtype, device):
    """The torch.dtype behind "auto", a name ("bfloat16") or a torch.dtype."""
    if dtype == "auto":
        return fast_dtype(device)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def check_vocabulary(model_config, info):
    """Refuse a dataset with token ids that the model has no embedding for."""
    size = model_config.get_text_config().vocab_size
    largest = info.get("max_token_id", info["vocab_size"] - 1)
    if largest >= size:
        came = f"the dataset (tokenizer {info['tokenizer_name']}) has ids up to {largest}"
        raise InputError(f"token ids below {size} needed by the model, {came}")


def check_positions(model, num_tokens):
    """Refuse contexts longer than a model's table of positions; warn of those that it was not trained on."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # MPT's name
    if not most or num_tokens <= most:
        return
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    said = f"contexts of at most {most} tokens needed by a {config.model_type}, got {num_tokens}"
    if config.model_type == "mpt" or any(POSITION_TABLE.search(name) for name, _ in named):
        raise InputError(f"{said}: --num_tokens {most} takes the first of each context")
    print(f"warning: {said}; what it computes behind them is guesswork", file=sys.stderr)


# Modules by the names that architectures give them: what adds its output to the residual stream, activation
# functions of an MLP and the projection behind, the norm before the logits, norms of what is added.
ADDED = {"mlp", "self_attn", "attn", "attention", "self_attention", "o_proj", "out_proj"}
ACTIVATION, BEHIND = ("act_fn", "act", "activation_fn"), ("down_proj", "c_proj", "fc2", "dense_4h_to_h")
FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
POST_NORM = ("post_feedforward_layernorm", "post_mlp_layernorm")


def way_to_logits(model, hookpoint):
    """A function: directions at the hookpoint [N, D] -> what they add to the logits, [N, vocabulary] float32.

    The direct path: the projection behind an MLP's activation function (its gate taken as 1), the weight of
    the final norm (its scale left out), the unembedding. None where an architecture's path is not known.
    """

    def child(module, names):
        children = (getattr(module, name, None) for name in names)
        return next((found for found in children if isinstance(found, torch.nn.Module)), None)

    place, _, last = hookpoint.rpartition(".")
    norm = child(getattr(model.base_model, "decoder", model.base_model), FINAL_NORM)
    unembedding, projection = model.get_output_embeddings(), None
    if last in ACTIVATION:
        projection = child(model.get_submodule(place), BEHIND)
    elif last not in ADDED and last not in BEHIND and not last.isdigit():  # a number: a whole layer
        return None
    post_norms = any(name.endswith(POST_NORM) for name, _ in model.named_modules()) and not last.isdigit()
    if norm is None or unembedding is None or post_norms or (last in ACTIVATION and projection is None):
        return None
    # The gain is read off what the norm returns: some multiply by 1 + weight, some subtract the mean.
    sign_D = torch.ones_like(unembedding.weight[0])
    sign_D[::2] = -1
    zero_D, one_D = norm(0 * sign_D), norm(sign_D.abs())
    gain_D, centres = ((norm(sign_D) - zero_D) * sign_D).float(), torch.allclose(one_D, zero_D, atol=1e-3)
    unembed_DV = unembedding.weight.float().T

    def logits(x_ND):
        if projection is not None:  # Conv1D stores its weight as [in, out], Linear as [out, in]
            conv = type(projection).__name__ == "Conv1D"
            x_ND = x_ND @ (projection.weight if conv else projection.weight.T).float()
        return ((x_ND - x_ND.mean(1, keepdim=True) if centres else x_ND) * gain_D) @ unembed_DV

    return logits
