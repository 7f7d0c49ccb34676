"""A training run: what its flags need, refused before weights are read, and the stream of its batches.

Contexts, in a new order each epoch -> rows of activations -> shuffled batches.
"""

import contextlib
import itertools
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from sae import InputError, __version__, activations, cli, models
from sae.processes import ALONE, Processes
from sae.tokens import check_tokenizer, load_tokenizer, open_dataset, read_contexts
from sae.training import steps, sweep
from sae.training.buffer import SharedBuffer, ShuffleBuffer, llm_batches, own_rows
from sae.training.evaluation import SLICE, Judge, split_held_out
from sae.training.folder import RunFolder, saved_preload, tensorboard
from sae.training.probe import token_classes
from sae.training.trainer import Resampling, new_trainer, train

# Flags that may differ when a run is resumed: they do not decide its results.
FREE_FLAGS = {
    "resume", "dry_run", "save_path", "dataset_path", "device_llm", "device_autoencoder", "trust_remote_code",
    "allow_other_tokenizer", "tensorboard", "num_gpus", "local_rank",
}  # fmt: skip
DEFAULT_PRELOAD = 25000
BAR = {"loss": "{loss:.4g}", "L0": "{l0:.1f}", "dead": "{dead}"}  # of the newest lines of the logs
HELD_OUT = (128, 4096)  # contexts, where the flag does not say: at least, at most


class Place(NamedTuple):
    """Where a model lies, and what its products run in."""

    device: torch.device
    dtype: torch.dtype


class Run(NamedTuple):
    """A run that nothing speaks against; no weight has been read yet."""

    configs: list  # for each autoencoder all that decides its results, plain values
    dataset: object  # datasets.Dataset
    dataset_path: str
    documents: np.ndarray  # of each row of the dataset
    training_rows: np.ndarray
    held_out_rows: np.ndarray
    llm: Place
    autoencoder: Place
    plan: str  # memory and data, for the user
    path: Path
    folders: list  # a RunFolder for each autoencoder, none for a dry run
    trust_remote_code: bool
    here: Processes  # that share the LLM's contexts and the autoencoders' features out

    @property
    def config(self):
        """Of the first autoencoder, for what they have in common."""
        return self.configs[0]

    @property
    def finished(self):
        return bool(self.folders) and all(folder.finished for folder in self.folders)

    def trainers(self):
        """A Trainer for each autoencoder, where its run stopped or at its beginning."""
        trainers = [new_trainer(config, *self.autoencoder, self.here) for config in self.configs]
        for folder, trainer in zip(self.folders, trainers, strict=False):
            folder.start(trainer)
        return trainers

    def save_resume(self, trainers):
        for folder, trainer in zip(self.folders, trainers, strict=True):
            folder.save_resume(trainer)

    def wait(self):
        """Until all that was saved is written."""
        for folder in self.folders:
            folder.wait()

    def bar(self, before):
        options = {"unit": "batch", "desc": "filling the buffer", "disable": self.here.rank > 0}
        return tqdm(total=self.config["num_batches"], initial=before, **options)

    def wrote(self, batches, seconds):
        """What the first process says at the end."""
        rate = batches * self.config["batch_size_autoencoder"] / max(seconds, 1e-9)
        lines = "\n".join(folder.wrote for folder in self.folders)
        return f"{lines}; {seconds:.0f} s, {rate:.0f} tokens/s"

    def open_llm(self):
        """The LLM and its module at the hookpoint."""
        model = models.load_model(self.config["model_name"], *self.llm, self.trust_remote_code)
        hookpoint, layer = self.config["hookpoint"], self.config["layer_id"]
        return model, activations.find_hookpoint(model, hookpoint, layer)[0]

    def judge(self, model, module):
        """The Judge on the held-out contexts; token classes where the dataset's tokenizer opens."""
        ids_MT = torch.cat(list(self.contexts(self.held_out_rows)))
        documents_M, classes_MT = self.documents[self.held_out_rows], torch.full_like(ids_MT, -1)
        with contextlib.suppress(InputError):
            tokenizer = load_tokenizer(self.dataset_path, self.config)
            for document in np.unique(documents_M):
                rows = np.flatnonzero(self.documents == document)
                ids_RT = self.dataset.with_format("numpy")[rows]["input_ids"]
                classes_RT = token_classes(tokenizer, ids_RT.flatten().tolist()).view(ids_RT.shape)
                where_M = np.flatnonzero(documents_M == document)
                held_out_M = np.searchsorted(rows, self.held_out_rows[where_M])
                classes_MT[where_M] = classes_RT[held_out_M, : ids_MT.shape[1]]
        skip, batch_size = self.config["skip_positions"], self.config["batch_size_llm"]
        return Judge(model, module, ids_MT, documents_M, classes_MT, skip, batch_size, self.here)

    def contexts(self, rows):
        """Batches of ids [B, T] of these rows of the dataset."""
        return read_contexts(self.dataset, rows, self.config["batch_size_llm"], self.config["num_tokens"])


def prepare(flags, here=ALONE):
    """The Run that the flags (a dict) describe; raises InputError for whatever speaks against it."""
    given = [flags["device_llm"], flags["device_autoencoder"]]
    if here.count > 1 and any(given):
        raise InputError(f"one process needed to choose devices, got {here.count}: each has its own")
    device_llm, device = cli.device_pair(*([here.device] * 2 if here.count > 1 else given))
    llm = Place(device_llm, models.pick_dtype(flags["dtype_llm"], device_llm))
    autoencoder = Place(device, models.fast_dtype(device))
    dataset, info = open_dataset(flags["dataset_path"])
    name, trust_remote_code = flags["model_name"], flags["trust_remote_code"]
    skeleton = models.skeleton(name, llm.dtype, trust_remote_code)
    models.check_vocabulary(skeleton.config, info)
    models.check_positions(skeleton, flags["num_tokens"] or info["min_tokens"])
    check_tokenizer(info, flags["model_name"], flags.get("allow_other_tokenizer"))
    template = flags[f"{flags['layer_type']}_hookpoint"]
    module, hookpoint = activations.find_hookpoint(skeleton, template, flags["layer_id"])
    width = activations.activation_width(skeleton, module)
    documents = dataset.with_format("numpy")["document"][:]
    training_rows, held_out_rows = split_held_out(documents, held_out_contexts(flags, info), flags["seed"])
    path, singles, resume = Path(flags["save_path"]), sweep.combinations(flags), flags["resume"]
    read = info, hookpoint, width, llm.dtype, len(training_rows)
    configs = [run_config(one, *read) for one in singles.values()]
    if (fewest := min(config["dict_vec_size"] for config in configs)) < here.count:
        raise InputError(
            f"--dict_vec_size of at least a feature a process needed, got {fewest}, {here.count}"
        )
    paths = [path / name for name in singles]
    preload, writes = configs[0]["num_batches_preload"], not flags["dry_run"]
    if writes:
        sweep.check_place(path, singles)
        if resume and preload is None:
            preload = saved_preload(paths)
    preload, plan = plan_memory(configs, preload, skeleton, llm, autoencoder, here)
    configs = [config | {"num_batches_preload": preload} for config in configs]
    writer = tensorboard() if flags["tensorboard"] else None
    places = zip(paths, configs, strict=True) if writes else ()
    options = resume, writer, here, _writes_beside(configs, device, here)
    folders = [RunFolder(*one, *options) for one in places]
    data = dataset, flags["dataset_path"], documents, training_rows, held_out_rows
    run = Run(configs, *data, llm, autoencoder, plan, path, folders, trust_remote_code, here)
    if run.finished and here.rank == 0:
        sweep.write(path, folders)  # a kill may have come before it
    return run


def held_out_contexts(flags, info):
    """How many contexts to judge by. Not given: a twentieth of the tokens between two checkpoints."""
    batches = [flags[name] for name in ("num_batches", "batches_between_ckpt") if flags[name]]
    tokens = min(batches, default=info["rows"]) * flags["batch_size_autoencoder"]
    contexts = tokens // (20 * (flags["num_tokens"] or info["min_tokens"]))
    return flags["held_out_contexts"] or min(max(contexts, HELD_OUT[0]), HELD_OUT[1])


def run_config(flags, info, hookpoint, act_vec_size, dtype_llm, training_contexts):
    """All that decides a run's results: the flags (a dict) with their defaults resolved, plain values.

    Raises InputError for flags that do not fit the hookpoint's width or the dataset's contexts.
    """
    if flags["act_vec_size"] not in (None, act_vec_size):
        raise InputError(f"--act_vec_size {act_vec_size} needed by {hookpoint}, got {flags['act_vec_size']}")
    context, skipped = flags["num_tokens"] or info["min_tokens"], flags["skip_positions"]
    if context > info["min_tokens"] or skipped >= context:
        raise InputError(
            f"--num_tokens up to {info['min_tokens']} (the dataset's contexts) and --skip_positions below it "
            f"needed, got {flags['num_tokens']} and {skipped}"
        )
    tokens, batch_size = training_contexts * (context - skipped), flags["batch_size_autoencoder"]
    if tokens < batch_size:
        raise InputError(
            f"--batch_size_autoencoder {batch_size} needs so many tokens to train on, there are {tokens}"
        )
    num_batches = flags["num_batches"] or tokens // batch_size
    dict_vec_size = flags["dict_vec_size"] or 4 * act_vec_size
    preload = flags["num_batches_preload"] and min(flags["num_batches_preload"], num_batches)
    given = {k: v for k, v in flags.items() if k not in FREE_FLAGS and not k.endswith("_hookpoint")}
    return given | {
        "num_batches": num_batches, "epoch_batches": tokens // batch_size, "num_batches_preload": preload,
        "training_contexts": training_contexts, "context_rows": context - skipped, "hookpoint": hookpoint,
        "act_vec_size": act_vec_size, "dict_vec_size": dict_vec_size,
        "dtype_llm": str(dtype_llm).removeprefix("torch."),
        "model_fingerprint": models.model_fingerprint(flags["model_name"]),
        "dataset_fingerprint": info["fingerprint"], "tokenizer_name": info["tokenizer_name"],
        "min_tokens": info["min_tokens"], "suite_version": __version__,
    } | steps.settings(flags, num_batches, dict_vec_size)  # fmt: skip


def plan_memory(configs, preload, skeleton, llm, autoencoder, here=ALONE):
    """Settle the batches in the shuffle buffer so that all fits; returns them and a line for the user.

    preload: None for the default, which fills at most half of the memory that is left; a given one may fill
    0.9 of it. llm, autoencoder: Places; the buffer lies with the autoencoders in the LLM's dtype. Of several
    processes (`here`) each gets a share, and the one with the least memory decides. Raises InputError where
    it cannot fit.
    """
    config, device = configs[0], autoencoder.device
    num_batches, N = config["num_batches"], config["batch_size_autoencoder"]
    parts = {
        "LLM": (llm.device, llm_bytes(config, skeleton, llm.dtype)),
        "autoencoder": (
            device,
            autoencoder_bytes(configs, autoencoder.dtype, device.type == "cuda", here.count),
        ),
    }
    left = {place: min(here.everyone(_free_bytes(place, here))) for place, _ in parts.values()}
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
    rest = len(configs) * D * 4 + firing
    return (
        f"\n{here.count} processes: memory is each one's; exchange per step, bytes: "
        f"{N * D * dtype_llm.itemsize} for rows, {len(configs) * N * D * 4}{auxk} for reconstructions, "
        f"{rest} more"
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


def _writes_beside(configs, device, here):
    """Whether training goes on while a state is written: on a GPU, if the CPU's memory holds a copy of it.

    On a CPU the copy would take a third more memory, and the thread time from the steps.
    """
    copies = sum(2 * 16 * config["act_vec_size"] * config["dict_vec_size"] for config in configs)
    return device.type == "cuda" and copies < _free_bytes(torch.device("cpu"), here)


def _free_bytes(device, here):
    """What this process may take: of a machine's memory its share, for the others fill theirs."""
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
    return free // here.neighbours


def stream(run, model, module, batch, stopping=lambda: False):
    """The ShuffleBuffer that gives batch number `batch` next; KeyboardInterrupt on `stopping()`."""
    config, device, here = run.config, run.autoencoder.device, run.here
    size, preload = config["batch_size_autoencoder"], config["num_batches_preload"]
    # The stream starts at the first row of the block that holds the batch, within a batch of the LLM.
    per_pass = config["batch_size_llm"] * config["context_rows"]
    first, skip = divmod(batch // preload * preload * size, per_pass)
    count = -(-config["num_batches"] * size // per_pass) - first
    count = -(-count // here.count) * here.count  # in the last round nobody stands aside
    order = llm_batches(len(run.training_rows), config["batch_size_llm"], config["seed"], first)
    order = itertools.islice(order, here.rank, count, here.count)
    bar = {"unit": "forward", "position": 1, "leave": False, "disable": here.rank > 0}
    order = tqdm(order, "LLM", count // here.count, **bar)
    contexts = itertools.chain.from_iterable(run.contexts(run.training_rows[places]) for places in order)
    rows = activations.activation_rows(model, module, contexts, config["skip_positions"])
    if device != run.llm.device:
        rows = activations.carried(rows, device)
    rows = _in_turn(cli.until(stopping, rows), here)
    chunks = (rows_ND[skip * (place == 0) :] for place, rows_ND in enumerate(rows))
    shape = size, config["num_batches"], preload, config["seed"], device
    return ShuffleBuffer(chunks, *shape) if here.count == 1 else SharedBuffer(chunks, *shape, here, per_pass)


def _in_turn(rows, here):
    """Of each round of the processes their rows in turn; of all but its own a process has the shape alone."""
    for own_ND in rows:
        for rank in range(here.count):
            yield own_ND if rank == here.rank else own_ND.to("meta")


def loop(run, model, module, trainers, buffer):
    """Train to the end and keep what is to be kept; yields after each step what the bar shows of it."""
    config, logs = run.config, {}
    method = config["neuron_resampling_method"]
    plan = method and Resampling(method, config["neuron_resampling_interval"])
    num_batches, interval = config["num_batches"], config["batches_between_ckpt"]
    judge = run.judge(model, module)
    for events in train(trainers, buffer, num_batches, plan, config["seed"]):
        for place, new in events.items():
            run.folders[place].append(new)
            logs.update((place, event) for event in new if event["event"] == "log")
        batch = max(trainers[place].batch for place in events)
        if batch == num_batches or (interval and batch % interval == 0):
            figures = judge.figures([trainers[place].autoencoder for place in events])
            for place, of_one in zip(events, figures, strict=True):
                run.folders[place].save_checkpoint(trainers[place], of_one)
            if run.here.rank == 0:
                sweep.write(run.path, run.folders)
            if batch == num_batches:
                run.wait()
        elif any(events.values()) and run.here.from_first(any(one.resume_is_old() for one in run.folders)):
            run.save_resume(trainers)
        shown = [logs[place] for place in sorted(logs)]
        yield {label: "/".join(text.format(**log) for log in shown) for label, text in BAR.items() if shown}


def timed_steps(run, model, module, trainers):
    """One line: the time a run takes, by the fastest of three LLM batches, steps, and updates alone."""
    config, device = run.config, run.autoencoder.device
    (ids_BT,), size = (
        run.contexts(run.training_rows[: config["batch_size_llm"]]),
        config["batch_size_autoencoder"],
    )
    llm, own, updates = [], [], []
    for _ in range(3):
        started = time.perf_counter()
        rows_ND = next(activations.activation_rows(model, module, [ids_BT], config["skip_positions"])).to(
            device
        )
        rows_ND.sum().item()  # reading a number waits for the device
        read = time.perf_counter()
        for trainer in trainers:
            batch_ND = rows_ND[torch.arange(size, device=device) % len(rows_ND)]
            run.here.total(batch_ND.mul_(run.here.rank == 0))  # as the buffers of several give it
            trainer.step(batch_ND)
            trainer.losses[-1].sum().item()
        stepped = time.perf_counter()
        for trainer in trainers:
            trainer.update()
            trainer.autoencoder.b_dec.sum().item()
        llm.append((read - started) * size / len(rows_ND) / run.here.count)
        own.append(stepped - read)
        updates.append(time.perf_counter() - stepped)

    return forecast(config, min(llm), min(own), min(updates), apart=device != run.llm.device)


def forecast(config, llm, step, update, apart):
    """One line from the seconds of a batch; apart: LLM and autoencoder have a device each, and work at once.

    The update takes as long for a batch of any size, the rest of a step grows with it.
    """

    def rate(times):
        """Tokens/s with batches so many times as large."""
        both = times * llm, times * (step - update) + update
        return times * config["batch_size_autoencoder"] / (max if apart else sum)(both)

    size = config["batch_size_autoencoder"]
    minutes, hint = config["num_batches"] * size / rate(1) / 60, ""
    if rate(4) > 1.1 * rate(1):
        hint = f", {rate(4):.0f} tokens/s expected with --batch_size_autoencoder {4 * size}"
    return (
        f"expected: {minutes:.1f} minutes at {rate(1):.0f} tokens/s, checkpoints aside; the update is "
        f"{update / step:.0%} of a step{hint}"
    )
