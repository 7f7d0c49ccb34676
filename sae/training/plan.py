"""What a run needs: memory of its devices, bytes between its processes, and time."""

import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sae import InputError, activations
from sae.processes import ALONE
from sae.training.buffer import own_rows
from sae.training.evaluation import SLICE

DEFAULT_PRELOAD = 25000
CPU = torch.device("cpu")
STATE_BYTES = 28  # for each pair of weights in a state that is written: they, their moments, a copy of W_enc


class Place(NamedTuple):
    """Where a model lies, and what its products run in."""

    device: torch.device
    dtype: torch.dtype


def plan_memory(configs, preload, skeleton, llm, autoencoder, here=ALONE):
    """Settle the batches in the shuffle buffer so that all fits; returns them and a line for the user.

    preload: None for the default, which fills at most half of the memory that is left; a given one may fill
    0.9 of it. llm, autoencoder: Places; the buffer lies with the autoencoders in the LLM's dtype. Of several
    processes (`here`) each gets a share, and the one with the least memory decides. Raises InputError where
    it cannot fit.
    """
    config, device = configs[0], autoencoder.device
    num_batches, N = config["num_batches"], config["batch_size_autoencoder"]
    own = autoencoder_bytes(configs, autoencoder.dtype, device.type == "cuda", here.count)
    parts = {"LLM": (llm.device, llm_bytes(config, skeleton, llm.dtype)), "autoencoder": (device, own)}
    if here.count > 1:
        parts["whole state to write"] = (CPU, max(_state_bytes(config) for config in configs))
    # Of a machine's memory a process may take its share, unless the others fill that of GPUs.
    sharers = here.neighbours if device == CPU else 1
    left = {place: min(here.everyone(_free_bytes(place, sharers))) for place, _ in parts.values()}
    for part, (place, size) in parts.items():
        left[place] -= size
        if left[place] < 0:
            raise InputError(
                f"{size / 1e9:.2f} GB for the {part} needed on {place}, {-left[place] / 1e9:.2f} too much: "
                "take a smaller --dict_vec_size, --batch_size_llm or --batch_size_autoencoder"
            )
    wanted = min(preload or DEFAULT_PRELOAD, num_batches)
    held = own_rows(wanted * N, config["batch_size_llm"] * config["context_rows"], here.count) / wanted
    batch_bytes = held * config["act_vec_size"] * llm.dtype.itemsize + 24 * N  # and places in the order
    fits = int(left[device] * (0.9 if preload else 0.5) / batch_bytes)
    if fits < (wanted if preload else 1):
        raise InputError(
            f"--num_batches_preload {wanted} needs {wanted * batch_bytes / 1e9:.2f} GB on {device}, where "
            f"{left[device] / 1e9:.2f} GB are left: at most {fits}"
        )
    settled = min(wanted, fits)
    sizes = ", ".join(f"{part} {size / 1e9:.2f}" for part, (_, size) in parts.items())
    fewer = f" of {wanted}: more would fill over half of what is left" if settled < wanted else ""
    again = "; each epoch comes in a new order" if num_batches > config["epoch_batches"] else ""
    line = (
        f"memory, GB: {sizes}, buffer {settled * batch_bytes / 1e9:.2f} ({settled} batches{fewer}); LLM in "
        f"{config['dtype_llm']} on {llm.device}, autoencoder in float32 on {device}, its products in "
        f"{str(autoencoder.dtype).removeprefix('torch.')}\n"
        f"data: {num_batches} batches of {N} tokens to train, {config['epoch_batches']} in an epoch{again}"
    )
    return settled, line + (_exchange(configs, llm.dtype, autoencoder.dtype, here) if here.count > 1 else "")


def _exchange(configs, dtype_llm, dtype, here):
    """A line on what several processes add up or gather in a step."""
    D, N = configs[0]["act_vec_size"], configs[0]["batch_size_autoencoder"]
    auxk = " (twice while features are dead)" if configs[0]["auxk"] else ""
    firing = sum((config["k"] or 0) * N * dtype.itemsize * here.count for config in configs)
    return (
        f"\n{here.count} processes: memory is each one's, but for the state, the first's alone; exchange per "
        f"step, bytes: {N * D * dtype_llm.itemsize} for rows, {len(configs) * N * D * 4}{auxk} for "
        f"reconstructions, {len(configs) * D * 4 + firing} more"
    )


def llm_bytes(config, skeleton, dtype):
    """Weights, activations, two batches of logits (of checkpoints), a few of one context in float32."""
    text = skeleton.config.get_text_config()
    widest = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    token = 3 * widest + 4 * text.hidden_size + 2 * text.vocab_size
    numbers = sum(one.numel() for one in skeleton.parameters())
    numbers += config["batch_size_llm"] * config["min_tokens"] * token
    return numbers * dtype.itemsize + config["min_tokens"] * text.vocab_size * 16


def autoencoder_bytes(configs, dtype, cuda=False, processes=1):
    """On the CPU measured with each architecture, dense and sparse.

    What lasts, of each: weights, gradients and Adam's two moments; copies for the products and room for a
    gradient (CUDA keeps gradients in their dtype: that pays for the copies). What the largest needs for a
    moment: two matrices, one on CUDA (for AuxK or a revival); numbers of a batch; what the allocator keeps.
    """
    lasting, passing, more = 0, [], 0 if cuda or dtype == torch.float32 else 3 * dtype.itemsize
    for config in configs:
        D, N = config["act_vec_size"], config["batch_size_autoencoder"]
        F = -(-config["dict_vec_size"] // processes)
        lasting += D * F * (2 * 4 * 4 + more)
        step, checkpoint = N * (4 * F * dtype.itemsize + 5 * D * 4), SLICE * (3 * F + 5 * D) * 4
        passing.append((1 if cuda else 2) * D * F * 4 + max(step, checkpoint))
    return lasting + max(passing) + 2**27


def _state_bytes(config):
    return STATE_BYTES * config["act_vec_size"] * config["dict_vec_size"]


def writes_beside(configs, device):
    """Whether training goes on while a state is written: on a GPU, if the CPU's memory holds a copy of it.

    On a CPU the copy would take a third more memory, and the thread time from the steps.
    """
    return device.type == "cuda" and sum(map(_state_bytes, configs)) < _free_bytes(CPU)


def _free_bytes(device, sharers=1):
    """What a process may take of a device's memory; that of a machine is shared by so many."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")  # a container's limit; the files it has cached count as free
    try:
        used = int((group / "memory.current").read_text())
        cached = int(re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)[1])
        free = min(free, int((group / "memory.max").read_text()) - used + cached)
    except (OSError, ValueError, TypeError):  # no such limit
        pass
    return free // sharers


def timed_steps(run, model, module, trainers):
    """One line: the time a run takes, by the fastest of three LLM batches, steps, and updates alone."""
    config, device, times = run.config, run.autoencoder.device, []
    size = config["batch_size_autoencoder"]
    (ids_BT,) = run.contexts(run.training_rows[: config["batch_size_llm"]])
    for _ in range(3):
        marks = [time.perf_counter()]
        (rows_ND,) = activations.activation_rows(model, module, [ids_BT], config["skip_positions"])
        rows_ND = rows_ND.to(device)
        rows_ND.sum().item()  # reading a number waits for the device
        marks.append(time.perf_counter())
        for trainer in trainers:
            batch_ND = rows_ND[torch.arange(size, device=device) % len(rows_ND)]
            run.here.total(batch_ND.mul_(run.here.rank == 0))  # as the buffers of several give it
            trainer.step(batch_ND)
            trainer.losses[-1].sum().item()
        marks.append(time.perf_counter())
        for trainer in trainers:
            trainer.update()
            trainer.autoencoder.b_dec.sum().item()
        times.append(np.diff([*marks, time.perf_counter()]))
    llm, step, update = np.min(times, axis=0)
    llm *= size / len(rows_ND) / run.here.count
    return forecast(config, llm, step, update, apart=device != run.llm.device)


def forecast(config, llm, step, update, apart):
    """One line from the seconds of a batch; apart: LLM and autoencoder have a device each, and work at once.

    The update takes as long for a batch of any size, the rest of a step grows with it.
    """
    size = config["batch_size_autoencoder"]

    def rate(times):
        """Tokens/s with batches so many times as large."""
        both = times * llm, times * (step - update) + update
        return times * size / (max if apart else sum)(both)

    minutes, hint = config["num_batches"] * size / rate(1) / 60, ""
    if rate(4) > 1.1 * rate(1):
        hint = f", {rate(4):.0f} tokens/s expected with --batch_size_autoencoder {4 * size}"
    return (
        f"expected: {minutes:.1f} minutes at {rate(1):.0f} tokens/s, checkpoints aside; the update is "
        f"{update / step:.0%} of a step{hint}"
    )
