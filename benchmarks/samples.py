"""What sampling costs besides the LLM: time against the bare pass, memory against the number of contexts.

    python benchmarks/samples.py --dataset_path demo/tokens --autoencoder_path demo/run/240.pt

Time: one pass over real contexts, in which the bare pass (dataset, LLM as far as the hookpoint, encode) and
the bookkeeping take turns and are timed apart, so that a busy machine slows both. Memory: the peak resident
memory of the whole script at 2,000 and at 50,000 contexts of a tiny Llama with 512 features.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SCRIPT = ROOT / "generate_interpretation_samples.py"


def cpu_model():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
    )


def time_pass(dataset_path, autoencoder_path, contexts):
    import torch

    from sae import processes, samples

    here = processes.alone_or_join(1)
    run = samples.prepare(
        here, contexts, dataset_path, autoencoder_path, "none.pt", None, None, None, -0.1, -2.0, 16, "auto"
    )
    rng = torch.Generator().manual_seed(0)
    rows_N, documents_N = run.rows(contexts, rng)
    survey = samples.Survey(run.checkpoint.autoencoder, documents_N, 24, 12, 16, rng)
    pieces = run.look(rows_N, torch.arange(contexts), "one pass", here, lambda: False, str)
    bare, books = 0.0, 0.0
    while True:
        start = time.perf_counter()
        piece = next(pieces, None)
        middle = time.perf_counter()
        bare += middle - start
        if piece is None:
            break
        survey.add(*piece)
        books += time.perf_counter() - middle
    features = survey.log10_frequency()
    start = time.perf_counter()
    choice = survey.choose(samples.in_band(features, -2.0, -0.1), run.checkpoint.autoencoder.W_dec)
    kept = choice.contexts_FK[choice.contexts_FK >= 0].unique()
    choosing = time.perf_counter() - start
    print(f"autoencoder {run.checkpoint.config['act_vec_size']} -> {len(features)}, LLM in {run.model.dtype}")
    print(
        f"L0 {survey.count_F.sum() / survey.tokens:.0f}, contexts of {run.context_tokens} tokens: {contexts}"
    )
    print(f"bare pass     {contexts / bare:8.2f} contexts/s")
    share = bare / (bare + books)
    print(f"with samples  {share * contexts / bare:8.2f} contexts/s, {share:.3f} of the bare rate")
    print(f"choosing      {choosing:8.2f} s, once; {len(kept)} of the contexts are looked at twice")


def write_tiny(folder, contexts, length=16, features=512):
    """A tiny random Llama, as many contexts of random tokens, and an autoencoder that fires on about 5%."""
    import torch
    from conftest import write_dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from sae.autoencoder import Autoencoder, save_checkpoint
    from sae.tokens import open_dataset

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    ids = torch.randint(0, 512, (contexts, length)).tolist()
    path = write_dataset(folder / "tokens", ids, range(contexts), folder / "tiny", vocab_size=512)
    autoencoder = Autoencoder(48, features, normalize=True)
    autoencoder.b_enc.data.fill_(-1.6)
    config = {
        "act_vec_size": 48, "dict_vec_size": features, "layer_id": 0, "layer_type": "mlp_activations",
        "hookpoint": "model.layers.0.mlp.act_fn", "model_name": str(folder / "tiny"),
        "normalize_dataset": True, "dataset_fingerprint": open_dataset(path)[1]["fingerprint"],
    }  # fmt: skip
    save_checkpoint(folder / "autoencoder.pt", config, autoencoder, torch.zeros(features))


def peak_memory(folder, contexts):
    """Peak resident memory in bytes of the script, and its last line."""
    command = [
        sys.executable, SCRIPT, str(contexts), "--dataset_path", folder / "tokens", "--batch_size", "64",
        "--autoencoder_path", folder / "autoencoder.pt", "--save_path", folder / "samples.pt",
    ]  # fmt: skip
    # A small process in between: what this one holds would count as the script's until it starts.
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", measure, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    *_, line, peak = done.stdout.strip().splitlines()
    return int(peak), line


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_path", default="demo/tokens")
    parser.add_argument("--autoencoder_path", default="demo/run/240.pt")
    parser.add_argument("--contexts", type=int, default=512, help="for the time; 0: leave out")
    parser.add_argument("--memory_contexts", type=int, nargs=2, default=[2000, 50000])
    args = parser.parse_args()
    import torch
    import transformers

    print(f"{cpu_model()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"python {platform.python_version()}, {versions}")
    if args.contexts:
        time_pass(args.dataset_path, args.autoencoder_path, args.contexts)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_tiny(folder, max(args.memory_contexts))
        peaks = []
        for contexts in args.memory_contexts:
            peak, line = peak_memory(folder, contexts)
            peaks.append(peak)
            print(f"{contexts:6d} contexts: peak {peak / 2**20:7.1f} MiB ({line})")
        print(f"peak memory x {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
