"""Features explained and scored per minute, with 1 and 2 processes, beside the naive way or another version.

    python benchmarks/interpret.py --samples demo/samples.pt --dataset demo/tokens --autoencoder demo/run/N.pt
    python benchmarks/interpret.py --memory --model inputs/qwen2.5-coder-1.5b
    python benchmarks/interpret.py --written --features 16 --samples ... --dataset ... --autoencoder ...

The naive way asks the same LLM to write the list of activations as text, up to 1,000 new tokens for each
scored context, one context after the other, and has no control. Everything else is this suite's.

--memory: what a process needs at most to read its share of the LLM, then a prompt, above what it had before.
Counted as Linux's Pss: what is the process's own, and its part of pages of the file that others look at too.

--written: what the keys and values of a batch of explanations take while it is written.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKENS = "--simulation tokens --num_explanations 2 --scores simulation"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def suite(args, address, processes, flags, root=ROOT):
    """Features per minute of the script's own last line (models loaded, explanations, scores, controls)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "samples.pt"
        copy.write_bytes(Path(args.samples).read_bytes())
        command = [Path(sys.executable).parent / "deepspeed", "--num_gpus", processes, "--master_port", 29777]
        command += [root / "interpret_autoencoder_deepspeed.py", address, "none", "--num_gpus", processes]
        command += ["--dataset_path", args.dataset, "--interpretation_samples_path", copy]
        command += ["--autoencoder_path", args.autoencoder, "--interpretation_model_name", args.model]
        command += ["--max_features", args.features, *flags.split()]
        command += ["--index", f"benchmark-{time.time_ns()}"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, cwd=root)
    said = re.search(r"(median score .*); .* ([\d.]+) features/minute", done.stdout)
    return float(said[2]), said[1]


def naive(args):
    """Features per minute when activations are written as text: (rate, new tokens a context)."""
    import torch

    from sae import models
    from sae.explanations import Plan, Settings, open_material, prompts
    from sae.explanations.chat import chat
    from sae.explanations.interpreter import Interpreter

    material = open_material(args.samples, args.dataset, args.autoencoder)
    work = Plan(material, Settings(num_interpretation_samples=3, num_simulation_samples=3))
    tokenizer = models.load_tokenizer(args.model)
    interpreter = Interpreter(models.load_model(args.model), tokenizer)
    started, feature = time.monotonic(), work.feature(0)
    shown = [
        (context.visible(), prompts.scaled(context.values_T.tolist(), feature.max_activation, 10))
        for context in feature.shown[:3]
    ]
    (explanation,) = interpreter.explanations([prompts.explain_question(shown)])
    explaining, written, started = time.monotonic() - started, 0, time.monotonic()
    for context in feature.scored[: args.naive_contexts]:
        messages = prompts.simulate_messages(explanation)
        messages[-1]["content"] += "\n\nTokens:\n" + "\n".join(context.visible())
        ids = tokenizer(chat(tokenizer, messages), add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = interpreter.model.generate(ids, max_new_tokens=1000, do_sample=False)
        written += out.shape[1] - ids.shape[1]
    contexts = min(args.naive_contexts, len(feature.scored))
    simulating = (time.monotonic() - started) / contexts * len(feature.scored)
    return 60 / (explaining + simulating), written / contexts


def memory_of_a_share(name, dtype):
    """In a process that deepspeed started: prints the most bytes that reading its share took."""
    import torch.distributed.tensor  # noqa: F401, in the baseline, as all code is

    from sae import models, processes
    from sae.explanations import prompts
    from sae.explanations.interpreter import Interpreter

    def held():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))

    def watch():
        while not read.wait(0.05):
            most[0] = max(most[0], held())

    here, tokenizer = processes.join(int(os.environ["WORLD_SIZE"])), models.load_tokenizer(name)
    models.skeleton(name)
    here.everyone(None)
    before, most, read = held(), [0], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    interpreter = Interpreter(processes.load_model(here, name, dtype, "tensor"), tokenizer)
    interpreter.next_token(["import os, sys\n" * 50], prompts.explain_messages)
    here.everyone(None)  # nobody lets go before all have looked
    most[0] = max(most[0], held())
    read.set()
    watcher.join()
    here.everyone(None)
    print(f"\n{json.dumps({'most': most[0] - before})}", flush=True)
    processes.Parser("").exit()


def memory(model):
    """A table: what the LLM needs in one process, and a half of it in each of two."""
    print("| dtype | processes | GB in each | of the whole |\n|---|---|---|---|")
    for dtype in ("bfloat16", "float32"):
        whole = None
        for processes in (1, 2):
            command = [
                Path(sys.executable).parent / "deepspeed",
                "--num_gpus",
                processes,
                __file__,
                model,
                dtype,
            ]
            said = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
            most = max(map(int, re.findall(r'{"most": (\d+)}', said)))
            whole = whole or most
            print(f"| {dtype} | {processes} | {most / 1e9:.2f} | {most / whole:.3f} |", flush=True)


def keys_and_values(args):
    """One line: MB of the texts' own keys and values, of what all share, and with a copy of that for each."""
    from sae import models
    from sae.explanations import Interpreter, Plan, Settings, candidates, open_material, prompts

    material = open_material(args.samples, args.dataset, args.autoencoder)
    plan = Plan(material, Settings(batch_size=args.features))
    interpreter = Interpreter(models.load_model(args.model), models.load_tokenizer(args.model))
    questions = [dict(candidates.questions(plan.feature(f), 1, 0))["text"] for f in plan.groups[0]]
    held, original = [], interpreter._logits

    def mb(pairs):
        return sum(kv.nbytes for pair in pairs for kv in pair) / 1e6

    def seen(ids_BL, at_BT, cache=None):
        logits_BTV = original(ids_BL, at_BT, cache)
        if hasattr(cache, "select"):
            shared = mb(interpreter._chat_prefix(prompts.excerpt_messages)[0].layers)
            own = mb(cache._kept) - shared
            held.append((own + shared * len(ids_BL), own, shared, len(ids_BL), cache.get_seq_length()))
        return logits_BTV

    interpreter._logits = seen
    interpreter.explanations(questions, 60, prompts.excerpt_messages, len(questions))
    copied, own, shared, texts, length = max(held)
    print(
        f"{texts} texts of {length} tokens: {own:.0f} MB and {shared:.0f} MB shared; copied {copied:.0f} MB"
    )


def main():
    if "RANK" in os.environ:
        return memory_of_a_share(*sys.argv[-2:])
    parser, features = (
        argparse.ArgumentParser(description=__doc__.split("\n", 1)[0]),
        "--memory" not in sys.argv,
    )
    parser.add_argument("--written", action="store_true", help="what a batch that is written needs instead")
    parser.add_argument("--memory", action="store_true", help="what a share of the LLM needs instead")
    parser.add_argument("--samples", required=features, help="interpretation samples")
    parser.add_argument("--dataset", required=features, help="their tokenised dataset")
    parser.add_argument("--autoencoder", required=features, help="their checkpoint")
    parser.add_argument("--model", default=str(ROOT / "inputs/smollm2"), help="LLM that explains")
    parser.add_argument("--features", type=int, default=8, help="features explained in each run")
    parser.add_argument("--naive_contexts", type=int, default=1, help="contexts simulated the naive way")
    parser.add_argument("--beside", help="checkout of another version, run instead of the naive way")
    args = parser.parse_args()
    for name in ("samples", "dataset", "autoencoder", "model"):
        setattr(args, name, str(Path(getattr(args, name) or "").resolve()))
    os.environ |= {"HF_HUB_OFFLINE": "1", "DS_BUILD_OPS": "0"}
    from servers import elasticsearch

    print(f"{platform.machine()}, {os.cpu_count()} cores; python {' '.join(sys.argv)}", flush=True)
    if args.memory or args.written:
        return memory(args.model) if args.memory else keys_and_values(args)
    print("| | features/minute | times the first |\n|---|---|---|")
    halves = f" --batch_size {(args.features + 1) // 2}"
    with elasticsearch() as url:
        if args.beside:
            slow, said = suite(args, url, 1, "", Path(args.beside).resolve())
            name = f"the other version: {said}"
        else:
            slow, written = naive(args)
            name = f"naive, 1 process, {written:.0f} tokens written a context, no control"
        print(f"| {name} | {slow:.2f} | 1 |", flush=True)
        for processes, flags in (
            (1, TOKENS), (1, ""), (1, "--scores simulation"),
            *(() if args.beside else ((2, "--parallel data" + halves), (2, "--parallel tensor" + halves))),
        ):  # fmt: skip
            rate, said = suite(args, url, processes, flags)
            print(f"| {processes} process(es) {flags}: {said} | {rate:.1f} | {rate / slow:.1f} |", flush=True)


if __name__ == "__main__":
    main()
