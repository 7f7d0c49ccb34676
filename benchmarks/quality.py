"""Quality of each architecture beside SAELens' own, on the same batches of activations.

    make .venv-interop/.done
    python benchmarks/quality.py MODEL DATASET [--batches 200] [--peer PYTHON_OF_SAE_LENS] [--folder FOLDER]

Activations of SmolLM2 layer 10 mlp_activations are computed once, shuffled as in training. Each trainer gets
the same batches of 1,024, dictionary size and learning rate; the rest as its defaults are. For relu and
SAELens' standard, L0 follows from the coefficient: --l1 and --peer_l1 take three values, found by trial, that
lead to about the values of --l0. All are judged by the same code on the same held-out documents.
--folder keeps the activations (6.3 GB for 2 million tokens) there, for further calls with the same flags.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}

ROWS, PEERS = 1024, {"relu": "standard", "batchtopk": "batchtopk", "jumprelu": "jumprelu"}
FLAG = {"relu": "l1_coefficient", "topk": "k", "batchtopk": "k", "jumprelu": "target_l0"}


def prepared(args, architecture, value):
    """The training script's own Run for these flags."""
    import train_autoencoder_from_tokens as script
    from sae import training

    whole = value if architecture in ("relu", "jumprelu") else int(value)
    words = [
        "10", "mlp_activations", "--model_name", args.model, "--dataset_path", args.dataset, "--dry_run",
        "--batch_size_autoencoder", ROWS, "--num_batches", args.batches, "--held_out_contexts", args.contexts,
        "--dict_vec_size", args.features, "--learning_rate", args.learning_rate, "--num_batches_preload", 100,
        "--architecture", architecture, f"--{FLAG[architecture]}", whole,
    ]  # fmt: skip
    sys.argv[1:] = [str(word) for word in words]
    return training.prepare(vars(script.parse_args()[1]))


def ours(run, rows_ND):
    """(autoencoder, seconds of training)"""
    from sae.training.buffer import ShuffleBuffer
    from sae.training.trainer import train

    (trainer,), config = run.trainers(), run.config
    num_batches, started = config["num_batches"], time.perf_counter()
    buffer = ShuffleBuffer(iter([rows_ND]), ROWS, num_batches, 8, 0, run.autoencoder.device)
    for _ in train([trainer], buffer, num_batches, None, 0):
        pass
    return trainer.autoencoder, time.perf_counter() - started


def theirs(args, architecture, value, folder):
    """The same of SAELens, trained by this file in its environment, as one of our autoencoders."""
    from safetensors.torch import load_file

    from sae.autoencoder import Autoencoder

    words = [
        args.peer, __file__, args.model, args.dataset, "--features", args.features, "--learning_rate",
        args.learning_rate, "--batches", args.batches, "--trained_here", folder, architecture, value,
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    state = load_file(folder / "out" / "sae_weights.safetensors")
    kind = "jumprelu" if "threshold" in state else "relu"
    autoencoder = Autoencoder(len(state["b_dec"]), args.features, architecture=kind)
    autoencoder.load_state_dict(state)
    return autoencoder.requires_grad_(False), float(done.stdout.split()[-1])


def kept_rows(folder, batches, chunks=None):
    """Rows [batches * ROWS, D] in a file of the folder, read as they are needed; written first, of chunks."""
    path = folder / "rows.bfloat16"
    if chunks is not None and not path.exists():
        partial = folder / "rows.partial"
        with open(partial, "wb") as file:
            for x_ND in chunks:
                file.write(x_ND.bfloat16().contiguous().view(torch.int16).numpy())
        partial.rename(path)
    numbers = torch.from_file(str(path), shared=False, size=path.stat().st_size // 2, dtype=torch.bfloat16)
    return numbers.view(batches * ROWS, -1)


def train_here(args):
    """Train one autoencoder by SAELens on the batches in the folder; prints the seconds."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    folder, architecture, value = (
        Path(args.trained_here[0]),
        args.trained_here[1],
        float(args.trained_here[2]),
    )
    rows_ND = kept_rows(folder, args.batches)
    configs = {
        "relu": (sae_lens.StandardTrainingSAE, sae_lens.StandardTrainingSAEConfig, {"l1_coefficient": value}),
        "batchtopk": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig, {"k": value}),
        "jumprelu": (sae_lens.JumpReLUTrainingSAE, sae_lens.JumpReLUTrainingSAEConfig, {"target_l0": value}),
    }
    configs["jumprelu"][2]["jumprelu_sparsity_loss_mode"] = "quadratic"  # the default mode ignores the target
    kind, config, own = configs[architecture]
    sae = kind(config(d_in=rows_ND.shape[1], d_sae=args.features, **own))
    settings = SAETrainerConfig(
        total_training_samples=len(rows_ND), train_batch_size_samples=ROWS, lr=args.learning_rate,
        lr_end=args.learning_rate / 10, autocast=True, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    batches = (x_ND.float() for x_ND in rows_ND.split(ROWS))
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        SAETrainer(settings, sae, batches).fit()
    seconds = time.perf_counter() - started
    sae.save_inference_model(str(folder / "out"))
    print(f"{seconds:.3f}")


@torch.no_grad()
def dead_share(autoencoder, rows_ND):
    """Features that fire on none of the last 65,536 rows."""
    fired_F = sum((autoencoder.features(x_ND) > 0).sum(0) for x_ND in rows_ND[-65536:].split(ROWS))
    return float((fired_F == 0).float().mean())


def line(name, judge, autoencoder, seconds, rows_ND):
    (found,) = judge.figures([autoencoder])
    low, high = found["loss_recovered_interval"]
    recovered = f"{found['loss_recovered']:.3f} ({low:.3f} to {high:.3f})"
    dead, probe = f"{dead_share(autoencoder, rows_ND):.1%}", f"{found['probe_f1'] or 0:.3f}"
    cells = f"{found['l0']:.1f}", f"{found['explained_variance']:.3f}", recovered, dead, probe
    print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--features", type=int, default=3072)
    parser.add_argument("--contexts", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--l0", type=float, nargs="+", default=(16, 32, 64))
    parser.add_argument("--l1", type=float, nargs="+", default=(2, 1, 0.5))
    parser.add_argument("--peer_l1", type=float, nargs="+", default=(2, 1, 0.5))
    parser.add_argument("--architectures", nargs="+", choices=FLAG, default=FLAG)
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--trained_here", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trained_here:
        return train_here(args)
    from sae import training

    run = prepared(args, "relu", 1.0)
    model, module = run.open_llm()
    judge, buffer = run.judge(model, module), training.stream(run, model, module, 0)
    size = f"{run.config['act_vec_size']} -> {args.features}"
    print(f"torch {torch.__version__}, {args.batches * ROWS:,} tokens, {size}, "
          f"{len(run.held_out_rows)} held-out contexts, learning rate {args.learning_rate:g}")  # fmt: skip
    print("| | L0 | explained variance | loss recovered (95%) | dead | probe F1 | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        rows_ND = kept_rows(folder, args.batches, buffer.batches())
        for architecture in args.architectures:
            own = (args.l1, args.peer_l1) if architecture == "relu" else (args.l0, args.l0)
            for value, peer_value in zip(*own, strict=True):
                line(architecture, judge, *ours(prepared(args, architecture, value), rows_ND), rows_ND)
                if args.peer and architecture in PEERS:
                    trained = theirs(args, architecture, peer_value, folder)
                    line(f"SAELens {PEERS[architecture]}", judge, *trained, rows_ND)


if __name__ == "__main__":
    main()
