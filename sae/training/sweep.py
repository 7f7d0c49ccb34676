"""Several settings in one run: their combinations train side by side on the same batches."""

import itertools
import json

from sae import InputError
from sae.artifacts import atomic_write
from sae.plots import draw, pareto

# Flags that take several values.
SWEPT = ("l1_coefficient", "learning_rate", "dict_vec_size", "k", "target_l0")
FIGURES = ("l0", "explained_variance", "loss_recovered", "loss_recovered_interval", "dead_share")


def combinations(flags):
    """{folder in save_path: flags of one value each}; the only folder is "" where no flag has several."""
    values = {flag: flags[flag] if isinstance(flags[flag], list) else [flags[flag]] for flag in SWEPT}
    for flag, some in values.items():
        if len(set(some)) < len(some):
            raise InputError(f"--{flag} needs values that differ, got {' '.join(map(str, some))}")
    if len(values["l1_coefficient"]) > 1 and flags["architecture"] in ("topk", "batchtopk"):
        raise InputError(
            f"several values of --l1_coefficient need relu or jumprelu, got {flags['architecture']}"
        )
    found = {}
    for chosen in itertools.product(*values.values()):
        single = dict(zip(SWEPT, chosen, strict=True))
        name = "-".join(f"{flag}_{single[flag]:.12g}" for flag in SWEPT if len(values[flag]) > 1)
        found[name] = flags | single
    return found


def check_place(path, names):
    """Refuse to mix a single run with a sweep, or sweeps of other values."""
    there = {file.parent.name for flag in SWEPT for file in path.glob(f"{flag}_*/metrics.jsonl")}
    there |= {""} if any(path.glob("*.pt")) else set()
    if not there <= set(names):
        needed, came = (", ".join(sorted(some)) or "a single run" for some in (names, there))
        raise InputError(f"a --save_path of its own needed for {needed}; {path} holds {came}")


def write(path, folders):
    """sweep.jsonl, a line for each checkpoint of each run, from what their folders hold; and its picture."""
    for partial in path.glob(".sweep.*.partial"):  # what a kill in the middle of writing left
        partial.unlink()
    lines = []
    for folder in folders:
        settings = {"folder": folder.path.name} | {flag: folder.config[flag] for flag in SWEPT}
        checkpoints = (event for event in folder.metrics() if event["event"] == "checkpoint")
        lines += [
            {key: event[key] for key in ("batch", "tokens")} | settings | {key: event[key] for key in FIGURES}
            for event in checkpoints
        ]
    lines.sort(key=lambda line: line["batch"])
    with atomic_write(path / "sweep.jsonl", "w") as handle:
        handle.writelines(json.dumps(line) + "\n" for line in lines)
    draw(pareto, path / "sweep.png", list({line["folder"]: line for line in lines}.values()))
