"""Load an LLM and its tokenizer: by hub name, from a folder, or from a .gguf file."""

from pathlib import Path

import torch

from sae import InputError


def load_tokenizer(name):
    """The tokenizer of a model; `name` is a hub name, a folder or a .gguf file."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, "tokenizer", name)


def load_model(name, device="cpu", dtype="auto"):
    """The causal language model `name` on `device`, ready for inference (no gradients, no dropout).

    `dtype` is a torch.dtype or a name; "auto" is `fast_dtype(device)`.
    """
    from transformers import AutoModelForCausalLM

    dtype = pick_dtype(dtype, device)
    model = _load(AutoModelForCausalLM, "causal language model", name, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def skeleton(name):
    """The model without weights, on device "meta": hookpoints, widths and sizes before anything is read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _load(AutoConfig, "model", name)
    try:
        with torch.device("meta"):
            # Other attention implementations look at values, which a meta tensor has not.
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except ValueError as err:
        raise InputError(f"a causal language model needed, {name} is a {config.model_type}") from err


def _load(auto_class, what, name, **options):
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = Path(name)
    if path.suffix == ".gguf":
        name, options["gguf_file"] = str(path.parent), path.name
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError) as err:
        reason = " ".join(str(err).split())[:300]
        raise InputError(
            f"{what} needed: {path} is no hub name, folder or .gguf that opens: {reason}"
        ) from err


def fast_dtype(device):
    """bfloat16 where the hardware multiplies it fast, else float32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    cpu_is_fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if cpu_is_fast else torch.float32


def pick_dtype(dtype, device):
    """The torch.dtype behind "auto", a name ("bfloat16") or a torch.dtype."""
    if dtype == "auto":
        return fast_dtype(device)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def check_vocabulary(model_config, info):
    """Refuse a dataset with token ids that the model has no embedding for."""
    size = model_config.get_text_config().vocab_size
    if info["vocab_size"] > size and info.get("max_token_id", info["vocab_size"] - 1) >= size:
        raise InputError(
            f"token ids below {size} needed by the model, the dataset (tokenizer {info['tokenizer_name']}) "
            f"has ids up to {info.get('max_token_id', info['vocab_size'] - 1)}"
        )
