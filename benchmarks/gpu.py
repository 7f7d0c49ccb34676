"""What a GPU makes of it: tokens/s of the LLM, of the step, of both side by side, and the share of its peak.

    python benchmarks/gpu.py [--explain SAMPLES DATASET AUTOENCODER MODEL]
    python benchmarks/gpu.py --table

CodeLlama 7B by its config (random weights, no hub) to layer 19 mlp_activations, 11,008 -> 44,032. The peak
is a large bfloat16 product in the same run. 50 features fire on a token; the update is timed as version 0.1
had it (one operation after the other) and as it is. Without a GPU all is small: a dry run, whose figures say
nothing. --explain: features a minute of the fourth script. --table measures nothing: by the functions that
plan a run's memory it computes what 1 to 8 GPUs of 80 GB need for 1 billion tokens.
"""

import argparse
import itertools
import math
import os
import re
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train import seconds  # noqa: E402

from sae import activations, autoencoder, cli, models  # noqa: E402
from sae.training import plan, steps, trainer  # noqa: E402

CODELLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32016, "max_position_embeddings": 16384,
}  # fmt: skip
TINY = CODELLAMA | {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 1000}
# Assumed for --table: an H100 SXM, half of its bfloat16 peak, 0.8 of its memory's rate, NVLink's for sums.
FLOPS, BYTES, LINK = 0.5 * 989e12, 0.8 * 3.35e12, 300e9
UPDATE_BYTES, BATCH, TOKENS = 32, 8192, 1e9  # of a weight; rows of a step


# batches: rows of steps; contexts of a forward pass: how many, tokens; square: product that gives the peak.
Sizes = namedtuple("Sizes", "llm layer width features batches contexts square")
LARGE = Sizes(CODELLAMA, 19, 11_008, 44_032, (256, 1024, 8192), (16, 256), 8192)
SMALL = Sizes(TINY, 2, 688, 2752, (128, 512), (4, 64), 1024)


def build(sizes, device):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**sizes.llm)
    attention = {"attn_implementation": "eager"} if device.type == "meta" else {}
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=models.fast_dtype(device), **attention)
    return model.eval().requires_grad_(False)


def llm_pass(model, sizes, device):
    """A function that runs the LLM as far as the layer, and its products' FLOPs, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    module, _ = activations.find_hookpoint(model, "model.layers.{}.mlp.act_fn", sizes.layer)
    ids_BT = torch.ones(sizes.contexts, dtype=torch.long, device=device)
    more = {"attention_mask": ids_BT} if device.type == "meta" else {}  # without one it looks at values
    with FlopCounterMode(display=False) as counter:
        activations.activations_at(model, module, ids_BT, **more)
    return lambda: activations.activations_at(model, module, ids_BT), counter.get_total_flops()


def new_trainer(sizes, device, dtype):
    """A Trainer that hardly moves, of whose features 50 fire on a row of normal numbers."""
    ae = autoencoder.Autoencoder(
        sizes.width, sizes.features, rng=torch.Generator().manual_seed(0), device=device
    )
    # A pre-activation has mean 0 and variance 1: the bias decides how many are above 0.
    ae.b_enc.data.fill_(NormalDist().inv_cdf(50 / sizes.features))
    return trainer.Trainer(ae, 1e-12, 0.0, dtype)


def old_update(one):
    """A function: the update of version 0.1, on gradients in float32."""
    weights = [torch.nn.Parameter(weight.detach()) for weight in one.trained]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    adam, W_dec, grad = torch.optim.Adam(weights, lr=1e-12, fused=True), weights[0], weights[0].grad

    def update():
        grad.addcmul_(W_dec, torch.linalg.vecdot(grad, W_dec)[:, None], value=-1)
        adam.step()
        W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))
        one._copies.W_dec_FD.copy_(W_dec)
        one._copies.W_enc_FD.copy_(weights[1].T)

    return update


def step_lines(sizes, device, dtype, peak):
    """Prints a line for each batch size; returns the step of the last, dense, as a function."""
    one = new_trainer(sizes, device, dtype)
    with torch.no_grad():
        new, old = (seconds(work, device, 5) for work in (one.update, old_update(one)))
    print(f"\nupdate: {1000 * new:.1f} ms, as version 0.1 had it {1000 * old:.1f} ms\n")
    print("| rows | dense, ms | tokens/s | of the peak | sparse, ms | tokens/s |\n|---|---|---|---|---|---|")
    for rows in sizes.batches:
        x_ND, took = torch.randn(rows, sizes.width, device=device), []
        for limit in (0, 2):
            steps.SPARSE_BELOW[device.type, dtype] = limit
            took.append(seconds(lambda x_ND=x_ND: one.step(x_ND), device, 5))
        share = 10 * rows * sizes.width * sizes.features / took[0] / peak  # five products
        dense, sparse = (f"{1000 * some:.1f} | {rows / some:,.0f}" for some in took)
        print(f"| {rows} | {dense} | {share:.2f} | {sparse} |", flush=True)
    steps.SPARSE_BELOW[device.type, dtype] = 0
    return lambda: one.step(x_ND)


def side_by_side(*works):
    """Seconds of all (device, work, times) at once, each in a thread with a stream of its own."""

    def run_one(device, work, times):
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(stream):
            for _ in range(times):
                work()
        if stream:
            stream.synchronize()

    with ThreadPoolExecutor() as threads:
        return seconds(lambda: list(threads.map(run_one, *zip(*works, strict=True))), works[0][0], 3)


def measure(sizes, llm_device, device):
    dtype, side = models.fast_dtype(device), sizes.square
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    peak = 2 * side**3 / seconds(lambda: a @ b, device, 10, min)
    print(f"peak, a product of {side} x {side} in {dtype}: {peak / 1e12:.2f} TFLOP/s")
    forward, flops = llm_pass(build(sizes, llm_device), sizes, llm_device)
    took, tokens = seconds(forward, llm_device, 5), math.prod(sizes.contexts)
    print(f"LLM to layer {sizes.layer}: {tokens / took:,.0f} tokens/s, {flops / took / peak:.2f} of the peak")
    step, rows = step_lines(sizes, device, dtype, peak), sizes.batches[-1]
    times = math.lcm(rows, tokens)
    works = (llm_device, forward, times // tokens), (device, step, times // rows)
    alone, both = sum(side_by_side(work) for work in works), side_by_side(*works)
    print(
        f"\nLLM and step one after the other {times / alone:,.0f} tokens/s, side by side {times / both:,.0f}"
    )


def explainer(samples, dataset, checkpoint, model):
    """Features a minute, by what a first group takes; weights are read before."""
    batch = 16 if torch.cuda.is_available() else 2
    command = [
        Path(sys.executable).parent / "deepspeed", "--num_gpus", 1,
        ROOT / "interpret_autoencoder_deepspeed.py", "localhost:1", "none", "--num_gpus", 1, "--dry_run",
        "--interpretation_samples_path", samples, "--dataset_path", dataset,
        "--autoencoder_path", checkpoint, "--interpretation_model_name", model, "--batch_size", batch,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return 60 / float(re.search(r"and ([\d.]+) s each", done.stdout)[1])


def table():
    """Prints memory, exchange and hours of CodeLlama 7B, computed."""
    meta, dtype, D = torch.device("meta"), torch.bfloat16, LARGE.width
    model = build(LARGE, meta).to(dtype)
    flops = llm_pass(model, LARGE, meta)[1] / math.prod(LARGE.contexts)
    same = {"batch_size_llm": 16, "min_tokens": 256, "act_vec_size": D, "batch_size_autoencoder": BATCH}
    print("| features | GPUs | LLM, GB | autoencoder | left of 80 | exchange, GB a step | hours |")
    print("|---" * 7 + "|")
    for features, count in itertools.product((44_032, 352_256), (1, 2, 4, 8)):
        config = same | {"dict_vec_size": features}
        parts = plan.llm_bytes(config, model, dtype), plan.autoencoder_bytes([config], dtype, True, count)
        left, weights = 80e9 - sum(parts), 2 * D * features / count
        exchange = BATCH * D * (dtype.itemsize + 4) if count > 1 else 0  # rows in, reconstructions out
        seconds = flops / count / FLOPS + 5 * weights / FLOPS  # of a token: the LLM, five products
        seconds += weights * UPDATE_BYTES / BYTES / BATCH + 2 * (1 - 1 / count) * exchange / LINK / BATCH
        hours = f"{TOKENS * seconds / 3600:.1f}" if left > 0 else "does not fit"
        sizes = " | ".join(f"{one / 1e9:.1f}" for one in (*parts, left))
        print(f"| {features:,} | {count} | {sizes} | {exchange / 1e9:.2f} | {hours} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--explain", nargs=4, metavar=("SAMPLES", "DATASET", "AUTOENCODER", "MODEL"))
    parser.add_argument("--table", action="store_true")
    if (args := parser.parse_args()).table:
        return table()
    gpus = torch.cuda.device_count()
    name = torch.cuda.get_device_name() if gpus else "no GPU, a dry run: small sizes"
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}; python {' '.join(sys.argv)}")
    measure(LARGE if gpus else SMALL, *cli.device_pair(None, None))
    if args.explain:
        print(f"explainer: {explainer(*args.explain):.1f} features/minute")


if __name__ == "__main__":
    main()
