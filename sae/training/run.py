"""A training run: what speaks against it, before weights are read; the stream of its batches; the loop.

Contexts, in a new order each epoch -> rows of activations -> shuffled batches.
"""

import contextlib
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from sae import InputError, activations, cli, models
from sae.artifacts import check_folder
from sae.processes import ALONE, Processes
from sae.tokens import check_tokenizer, load_tokenizer, open_dataset, read_contexts
from sae.training import sweep
from sae.training.buffer import SharedBuffer, ShuffleBuffer, llm_batches
from sae.training.config import held_out_contexts, run_config
from sae.training.evaluation import Judge, split_held_out
from sae.training.folder import RunFolder, saved_preload, tensorboard
from sae.training.plan import Place, plan_memory, writes_beside
from sae.training.probe import token_classes
from sae.training.trainer import Resampling, new_trainer, train

BAR = {"loss": "{loss:.4g}", "L0": "{l0:.1f}", "dead": "{dead}"}  # of the newest lines of the logs


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

    def open_llm(self):
        """The LLM and its module at the hookpoint."""
        model = models.load_model(self.config["model_name"], *self.llm, self.trust_remote_code)
        hookpoint, layer = self.config["hookpoint"], self.config["layer_id"]
        return model, activations.find_hookpoint(model, hookpoint, layer)[0]

    def trainers(self):
        """A Trainer for each autoencoder, where its run stopped or at its beginning."""
        trainers = [new_trainer(config, *self.autoencoder, self.here) for config in self.configs]
        for folder, trainer in zip(self.folders, trainers, strict=False):
            folder.start(trainer)
        return trainers

    def contexts(self, rows):
        """Batches of ids [B, T] of these rows of the dataset."""
        return read_contexts(self.dataset, rows, self.config["batch_size_llm"], self.config["num_tokens"])

    def judge(self, model, module):
        """The Judge on the held-out contexts; token classes where the dataset's tokenizer opens."""
        ids_MT = torch.cat(list(self.contexts(self.held_out_rows)))
        documents_M, classes_MT = self.documents[self.held_out_rows], torch.full_like(ids_MT, -1)
        with contextlib.suppress(InputError):
            tokenizer = load_tokenizer(self.dataset_path, self.config)
            for document in np.unique(documents_M):
                rows, here_M = (np.flatnonzero(some == document) for some in (self.documents, documents_M))
                ids_RT = self.dataset.with_format("numpy")[rows]["input_ids"]
                classes_RT = token_classes(tokenizer, ids_RT.flatten().tolist()).view(ids_RT.shape)
                places = np.searchsorted(rows, self.held_out_rows[here_M])
                classes_MT[here_M] = classes_RT[places, : ids_MT.shape[1]]
        skip, batch_size = self.config["skip_positions"], self.config["batch_size_llm"]
        return Judge(model, module, ids_MT, documents_M, classes_MT, skip, batch_size, self.here)

    def save_resume(self, trainers):
        for folder, trainer in zip(self.folders, trainers, strict=True):
            folder.save_resume(trainer)

    def wait(self):
        """Until all that was saved is written."""
        for folder in self.folders:
            folder.wait()

    def compare(self):
        """Write what a sweep's autoencoders come to, side by side."""
        with self.here.first_decides():
            if self.here.rank == 0 and len(self.folders) > 1:
                sweep.write(self.path, self.folders)

    def bar(self, before):
        options = {"unit": "batch", "desc": "filling the buffer", "disable": self.here.rank > 0}
        return tqdm(total=self.config["num_batches"], initial=before, **options)

    def wrote(self, batches, seconds):
        """What the first process says at the end."""
        rate = batches * self.config["batch_size_autoencoder"] / max(seconds, 1e-9)
        lines = "\n".join(folder.wrote for folder in self.folders)
        return f"{lines}; {seconds:.0f} s, {rate:.0f} tokens/s"


def prepare(flags, here=ALONE):
    """The Run that the flags (a dict) describe; raises InputError for whatever speaks against it."""
    given = [flags["device_llm"], flags["device_autoencoder"]]
    if here.count > 1 and any(given):
        raise InputError(f"one process needed to choose devices, got {here.count}: each has its own")
    device_llm, device = cli.device_pair(*([here.device] * 2 if here.count > 1 else given))
    llm = Place(device_llm, models.pick_dtype(flags["dtype_llm"], device_llm))
    autoencoder = Place(device, models.fast_dtype(device))
    dataset, info = open_dataset(flags["dataset_path"])
    skeleton = models.skeleton(flags["model_name"], llm.dtype, flags["trust_remote_code"])
    models.check_vocabulary(skeleton.config, info)
    models.check_positions(skeleton, flags["num_tokens"] or info["min_tokens"])
    check_tokenizer(info, flags["model_name"], flags["allow_other_tokenizer"])
    template = flags[f"{flags['layer_type']}_hookpoint"]
    module, hookpoint = activations.find_hookpoint(skeleton, template, flags["layer_id"])
    numbers = [part for part in template.split(".") if part.isdecimal()]
    if hookpoint == template and numbers[:1] != [str(flags["layer_id"])]:
        needed = f"one {{}} for the layer, or {flags['layer_id']} in its place"
        raise InputError(f"--{flags['layer_type']}_hookpoint needs {needed}, got {template!r}")
    width = activations.activation_width(skeleton, module)
    documents = dataset.with_format("numpy")["document"][:]
    training_rows, held_out_rows = split_held_out(documents, held_out_contexts(flags, info), flags["seed"])
    read = info, hookpoint, width, llm.dtype, len(training_rows)
    path, singles, resume = Path(flags["save_path"]), sweep.combinations(flags), flags["resume"]
    configs = [run_config(one, *read) for one in singles.values()]
    if (fewest := min(config["dict_vec_size"] for config in configs)) < here.count:
        raise InputError(
            f"--dict_vec_size of at least a feature a process needed, got {fewest}, {here.count}"
        )
    paths, preload = [path / name for name in singles], configs[0]["num_batches_preload"]
    with here.first_decides():
        if here.rank == 0:
            check_folder("--save_path", path)
    if not flags["dry_run"]:
        sweep.check_place(path, singles)
        if resume and preload is None:
            preload = saved_preload(paths)
    preload, plan = plan_memory(configs, preload, skeleton, llm, autoencoder, here)
    configs = [config | {"num_batches_preload": preload} for config in configs]
    options = resume, tensorboard() if flags["tensorboard"] else None, here, writes_beside(configs, device)
    places = () if flags["dry_run"] else zip(paths, configs, strict=True)
    folders = [RunFolder(*one, *options) for one in places]
    data = dataset, flags["dataset_path"], documents, training_rows, held_out_rows
    run = Run(configs, *data, llm, autoencoder, plan, path, folders, flags["trust_remote_code"], here)
    if run.finished:
        run.compare()  # a kill may have come before it
    return run


def stream(run, model, module, batch, stopping=lambda: False):
    """The ShuffleBuffer that gives batch number `batch` next; KeyboardInterrupt on `stopping()`."""
    config, device, here = run.config, run.autoencoder.device, run.here
    size, preload = config["batch_size_autoencoder"], config["num_batches_preload"]
    # The stream starts at the first row of the block that holds the batch, within a batch of the LLM.
    per_pass = config["batch_size_llm"] * config["context_rows"]
    first, skip = divmod(batch // preload * preload * size, per_pass)
    count = -(-config["num_batches"] * size // per_pass) - first
    count = -(-count // here.count) * here.count  # every process takes part in the last round
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
    """The rows of all processes in turn; another one's are on the device "meta": a shape without memory."""
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
            if new:
                run.folders[place].append(new)
            logs.update((place, event) for event in new if event["event"] == "log")
        batch = max(trainers[place].batch for place in events)
        if batch == num_batches or (interval and batch % interval == 0):
            figures = judge.figures([trainers[place].autoencoder for place in events])
            for place, of_one in zip(events, figures, strict=True):
                run.folders[place].save_checkpoint(trainers[place], of_one)
            run.compare()
            if batch == num_batches:
                run.wait()
        elif any(events.values()) and run.here.from_first(any(one.resume_is_old() for one in run.folders)):
            run.save_resume(trainers)
        shown = [logs[place] for place in sorted(logs)]
        yield {label: "/".join(text.format(**log) for log in shown) for label, text in BAR.items() if shown}
