"""A training run: its settings, what it needs of memory, where its stream starts, how long it takes."""

import re
import time
from pathlib import Path

import torch

from sae import InputError, __version__
from sae.training.evaluation import SLICE

# Flags that may differ when a run is resumed: they do not decide its results.
FREE_FLAGS = {"resume", "dry_run", "save_path", "dataset_path", "device_llm", "device_autoencoder"}
DEFAULT_PRELOAD = 25000


def run_config(flags, info, hookpoint, act_vec_size, dtype_llm, training_contexts):
    """All that decides a run's results: the flags (a dict) with their defaults resolved, plain values.

    Raises InputError for flags that do not fit the hookpoint's width or the dataset's contexts.
    """
    config = {k: v for k, v in flags.items() if k not in FREE_FLAGS and not k.endswith("_hookpoint")}
    if flags["act_vec_size"] not in (None, act_vec_size):
        raise InputError(f"--act_vec_size {act_vec_size} needed by {hookpoint}, got {flags['act_vec_size']}")
    context = flags["num_tokens"] or info["min_tokens"]
    if context > info["min_tokens"] or flags["skip_positions"] >= context:
        raise InputError(
            f"--num_tokens up to {info['min_tokens']} (the dataset's contexts) and --skip_positions below it "
            f"needed, got {flags['num_tokens']} and {flags['skip_positions']}"
        )
    config["context_rows"] = context - flags["skip_positions"]
    epoch_batches = training_contexts * config["context_rows"] // flags["batch_size_autoencoder"]
    if epoch_batches == 0:
        raise InputError(
            f"--batch_size_autoencoder {flags['batch_size_autoencoder']} needs as many tokens to train on, "
            f"the dataset has {training_contexts * config['context_rows']}"
        )
    num_batches = flags["num_batches"] or epoch_batches
    preload = flags["num_batches_preload"] and min(flags["num_batches_preload"], num_batches)
    return config | {
        "num_batches": num_batches, "epoch_batches": epoch_batches,
        "num_batches_preload": preload, "training_contexts": training_contexts, "act_vec_size": act_vec_size,
        "dict_vec_size": flags["dict_vec_size"] or 4 * act_vec_size, "architecture": "relu",
        "hookpoint": hookpoint, "dtype_llm": str(dtype_llm).removeprefix("torch."),
        "dataset_fingerprint": info["fingerprint"], "tokenizer_name": info["tokenizer_name"],
        "min_tokens": info["min_tokens"], "suite_version": __version__,
    }  # fmt: skip


def plan_memory(config, skeleton, llm, autoencoder):
    """Settle `num_batches_preload` so that all fits; returns the config and a line for the user.

    llm, autoencoder: (device, dtype); the buffer lies with the autoencoder in the LLM's dtype. A default
    buffer fills at most half of the memory that is left, a given one 0.9 of it. Raises InputError where it
    cannot fit.
    """
    (llm_device, llm_dtype), (device, dtype) = llm, autoencoder
    D, F, N = config["act_vec_size"], config["dict_vec_size"], config["batch_size_autoencoder"]
    text = skeleton.config.get_text_config()
    widest = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    tokens = config["batch_size_llm"] * config["min_tokens"]
    weights = sum(parameter.numel() for parameter in skeleton.parameters())
    parts = {
        # Checkpoints need its logits as well, those of one context in float32.
        "LLM": (weights + tokens * (3 * widest + 4 * text.hidden_size + text.vocab_size)) * llm_dtype.itemsize
        + config["min_tokens"] * text.vocab_size * 4,
        # Weights, gradients and Adam's two moments; the copies of weights and gradients for the products.
        "autoencoder": 2 * D * F * (4 * 4 + 2 * dtype.itemsize)
        + max(N * (3 * F * dtype.itemsize + 5 * D * 4), SLICE * (3 * F + 5 * D) * 4),
    }
    free = {place: _free_bytes(place) for place in (llm_device, device)}
    left = dict(free)
    for part, place in (("LLM", llm_device), ("autoencoder", device)):
        left[place] -= parts[part]
        if left[place] < 0:
            raise InputError(
                f"{parts[part] / 1e9:.2f} GB for the {part} needed on {place}, {-left[place] / 1e9:.2f} too "
                "much: take a smaller --dict_vec_size, --batch_size_llm or --batch_size_autoencoder"
            )
    batch_bytes = N * (D * llm_dtype.itemsize + 24)  # and the rows' places in the shuffled order
    wanted = min(config["num_batches_preload"] or DEFAULT_PRELOAD, config["num_batches"])
    fits = int(left[device] * (0.9 if config["num_batches_preload"] else 0.5) / batch_bytes)
    if fits < 1 or (config["num_batches_preload"] and wanted > fits):
        raise InputError(
            f"--num_batches_preload {wanted} needs {wanted * batch_bytes / 1e9:.2f} GB on {device}, where "
            f"{left[device] / 1e9:.2f} GB are left: at most {fits}"
        )
    preload = min(wanted, fits)
    sizes = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts.items())
    line = (
        f"memory, GB: {sizes}, buffer {preload * batch_bytes / 1e9:.2f} ({preload} batches"
        f"{f' of {wanted}: more would fill over half of what is left' if preload < wanted else ''}); "
        f"LLM in {config['dtype_llm']} on {llm_device}, autoencoder in float32 on {device}, its products in "
        f"{str(dtype).removeprefix('torch.')}\n"
        f"data: {config['num_batches']} batches of {N} tokens to train, {config['epoch_batches']} in an epoch"
        f"{'; each epoch comes in a new order' if config['num_batches'] > config['epoch_batches'] else ''}"
    )
    return config | {"num_batches_preload": preload}, line


def _free_bytes(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")  # a container's limit; the files it has cached count as free
    try:
        used = int((group / "memory.current").read_text())
        cached = int(re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)[1])
        return min(free, int((group / "memory.max").read_text()) - used + cached)
    except (OSError, ValueError, TypeError):  # no such limit
        return free


def stream_start(config, batch):
    """Where the stream of rows must start so that the buffer can give batch number `batch` next.

    Returns (number of the LLM batch, its rows to leave out, number of LLM batches up to the run's end).
    """
    rows_per_llm_batch = config["batch_size_llm"] * config["context_rows"]
    block = batch // config["num_batches_preload"] * config["num_batches_preload"]
    first, skip = divmod(block * config["batch_size_autoencoder"], rows_per_llm_batch)
    return first, skip, -(-config["num_batches"] * config["batch_size_autoencoder"] // rows_per_llm_batch)


def timed_steps(trainer, rows, config, overlap):
    """One line: the time a run takes, from three LLM batches and three training steps (two of each timed).

    `overlap`: LLM and autoencoder have a device each and work at once.
    """
    chunks, size = [], config["batch_size_autoencoder"]

    def forward():
        chunks.append(next(rows))
        return chunks[-1]

    def step():
        trainer.step(batch_ND)
        return trainer.losses[-1]

    def seconds(work):
        work().sum().item()  # reading a number waits for the device
        started = time.perf_counter()
        for _ in range(2):
            last = work()
        last.sum().item()
        return (time.perf_counter() - started) / 2

    llm = seconds(forward) * size / len(chunks[0])
    batch_ND = chunks[0][torch.arange(size, device=chunks[0].device) % len(chunks[0])]
    batch_seconds = max(llm, seconds(step)) if overlap else llm + seconds(step)
    minutes = batch_seconds * config["num_batches"] / 60
    return f"expected: {minutes:.1f} minutes at {size / batch_seconds:.0f} tokens/s, checkpoints aside"
