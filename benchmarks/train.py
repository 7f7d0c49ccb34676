"""Training speed as a share of its floor: LLM to the hookpoint + the matrix products + Adam, each alone.

    python benchmarks/train.py MODEL DATASET [--batches 100 300] [--peer .venv-interop/bin/python] [--memory]
    python benchmarks/train.py MODEL DATASET --sweep 0.5 1 2 4
    python benchmarks/train.py --steps

SmolLM2 layer 10 mlp_activations, 1536 -> 6144, 1,024 rows a batch, 16 contexts of 128 tokens a forward pass.
The script is run twice, and the difference of the two times counts: start, model loading and the last
checkpoint cancel. --peer: the same for SAELens, in an environment that has it. --memory instead compares the
script's peak memory on the dataset and on one with 100,000 contexts more. --sweep: the time of one run with
these coefficients beside the sum of a run of each. --steps: the gradients of one step, by dense and by
sparse products, where 0.1% to 50% of the features fire.
"""

import argparse
import functools
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sae import activations, models, tokens  # noqa: E402
from sae.autoencoder import Autoencoder  # noqa: E402
from sae.training import steps  # noqa: E402

ROWS, D, F, CONTEXTS = 1024, 1536, 6144, 16


def seconds(work, device, repeats=8, pick=statistics.median):
    """Median time of one call, or another pick of several."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return pick(times[2:])


def floor(model_name, dataset, device):
    """Seconds for 1,024 tokens: LLM, five products, Adam."""
    model = models.load_model(model_name, device)
    module, _ = activations.find_hookpoint(model, "model.layers.{}.mlp.act_fn", 10)
    ids_BT = next(tokens.read_contexts(dataset, range(CONTEXTS), CONTEXTS))
    llm = seconds(lambda: activations.activations_at(model, module, ids_BT), device) * ROWS / ids_BT.numel()
    dtype = models.fast_dtype(device)
    x_ND, g_NF = torch.randn(ROWS, D, device=device).to(dtype), torch.randn(ROWS, F, device=device).to(dtype)
    W_FD = torch.randn(F, D, device=device).to(dtype)

    def products():  # encode, decode; gradients of the activations and of the two matrices
        return x_ND @ W_FD.T, g_NF @ W_FD, x_ND @ W_FD.T, g_NF.T @ x_ND, g_NF.T @ x_ND

    weights = [torch.nn.Parameter(torch.randn(F, D, device=device)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    adam = torch.optim.Adam(weights, fused=True)
    return {"LLM": llm, "products": seconds(products, device), "Adam": seconds(adam.step, device)}


def steps_table(device):
    """Prints the fastest of several calls of both ways, ms, at each share of features that fire."""
    print("| features that fire | float32 dense | sparse | bfloat16 dense | sparse |\n|---|---|---|---|---|")
    for share in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        row = []
        for dtype in (torch.float32, torch.bfloat16):
            rng = torch.Generator().manual_seed(0)
            ae = Autoencoder(D, F, rng=rng, device=device)
            for parameter in ae.parameters():
                parameter.grad = torch.zeros_like(parameter)
            x_ND = torch.randn(ROWS, D, generator=rng).to(device)
            # A pre-activation here has mean 0 and variance 1: the bias decides how many are above 0.
            ae.b_enc.data.fill_(math.sqrt(2) * torch.erfinv(torch.tensor(2 * share - 1)).item())
            copies = steps.copies(ae, dtype)
            for limit in (0, 2):
                steps.SPARSE_BELOW[device.type, dtype] = limit
                with torch.no_grad():
                    step = functools.partial(steps.gradients, ae, copies, x_ND, 1.0)
                    row.append(seconds(step, device, pick=min))
        print(f"| {share:.1%} | " + " | ".join(f"{1000 * took:.0f}" for took in row) + " |", flush=True)


def script(model_name, dataset_path, batches, preload, *more):
    """(seconds, peak resident bytes) of a run of the script, as it says itself and as the system counted.

    The system tells the highest peak of all children so far.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, ROOT / "train_autoencoder_from_tokens.py", "10", "mlp_activations",
            "--model_name", model_name, "--dataset_path", dataset_path, "--save_path", folder,
            "--num_batches", batches, "--num_batches_preload", preload, "--batches_between_ckpt", 0,
            "--batch_size_autoencoder", ROWS, "--batch_size_llm", CONTEXTS, "--learning_rate", 1e-3, *more,
        ]  # fmt: skip
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return float(re.search(r"([\d.]+) s, [\d.]+ tokens/s", done.stdout)[1]), peak


def sweep_ratio(args):
    """Prints the seconds, filling the buffer and checkpoints included, of single runs and of the sweep."""
    run = functools.partial(script, args.model, args.dataset, args.batches[0], 50, "--l1_coefficient")
    singles, together = [run(value)[0] for value in args.sweep], run(*args.sweep)[0]
    each = ", ".join(f"{took:.0f}" for took in singles)
    print(f"one by one {each} s; in one run {together:.0f} s, {together / sum(singles):.2f} of their sum")


def peer(python, model_name, dataset_path, batches):
    """Seconds of SAELens' training loop."""
    command = [python, ROOT / "benchmarks" / "peer_sae_lens.py", model_name, dataset_path, batches]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    return float(re.search(r"([\d.]+) s$", done.stdout.strip())[1])


def larger(dataset_path, folder, extra):
    """The dataset with its contexts repeated, `extra` more of them."""
    import datasets

    dataset, info = tokens.open_dataset(dataset_path)
    times = -(-extra // len(dataset)) + 1
    datasets.concatenate_datasets([dataset] * times).select(range(len(dataset) + extra)).flatten_indices(
        cache_file_name=str(folder / "flat.arrow")
    ).save_to_disk(str(folder / "data"))
    (folder / "data" / tokens.INFO_FILE).write_text(json.dumps(info | {"rows": len(dataset) + extra}))
    return folder / "data"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("dataset", nargs="?")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--batches", type=int, nargs=2, default=(100, 300))
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--sweep", type=float, nargs="+", metavar="L1")
    args = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {models.fast_dtype(device)}")
    if args.steps:
        return steps_table(device)
    if args.memory:
        with tempfile.TemporaryDirectory() as folder:
            more = larger(args.dataset, Path(folder), 100_000)
            small, large = (script(args.model, path, 20, 10)[1] for path in (args.dataset, more))
        print(f"peak memory: {small / 2**20:.0f} MiB; with 100,000 contexts more {large / 2**20:.0f} MiB")
        return
    if args.sweep:
        return sweep_ratio(args)
    dataset, _ = tokens.open_dataset(args.dataset)
    floors = [floor(args.model, dataset, device)]
    short, long = (script(args.model, args.dataset, batches, 50)[0] for batches in args.batches)
    floors.append(floor(args.model, dataset, device))
    rates = {"train_autoencoder_from_tokens.py": (args.batches[1] - args.batches[0]) * ROWS / (long - short)}
    if args.peer:
        short, long = (peer(args.peer, args.model, args.dataset, batches) for batches in args.batches)
        rates["SAELens"] = (args.batches[1] - args.batches[0]) * ROWS / (long - short)
    parts = {part: statistics.mean(one[part] for one in floors) for part in floors[0]}
    best = ROWS / sum(parts.values())
    print("| | tokens/s | share of the floor |\n|---|---|---|")
    for part, took in parts.items():
        print(f"| {part} alone | {ROWS / took:,.0f} | |")
    print(f"| floor: the three one after the other | {best:,.0f} | 1 |")
    for what, rate in rates.items():
        print(f"| {what} | {rate:,.0f} | {rate / best:.2f} |")


if __name__ == "__main__":
    main()
