"""How to read simulated activations off an LLM: correlation with planted features.

    python benchmarks/simulation.py --model MODEL --tokenizer inputs/smollm2 --corpus inputs/stdlib

Features of known meaning are planted in real code: each fires on the tokens that a rule picks. Every way of
reading sees the same contexts. `wrong` is the next feature's explanation on the same contexts. The sigmoid's
constants are chosen on the features with even numbers and shown on all, the odd ones apart.
"""

import argparse
import itertools
import json
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sae import models  # noqa: E402
from sae.explanations import explain, prompts  # noqa: E402
from sae.explanations.interpreter import Interpreter  # noqa: E402

# What each fires on, in words; the rule: activation of a token, given its text.
PLANTED = (
    ("the keyword import", lambda text: text.strip() == "import"),
    ("opening parentheses", lambda text: "(" in text),
    ("the name self", lambda text: text.strip() == "self"),
    ("underscores", lambda text: "_" in text),
    ("the keyword return", lambda text: text.strip() == "return"),
    ("quotation marks that begin or end a string", lambda text: "'" in text or '"' in text),
    ("words about errors and exceptions", lambda text: bool(re.search("(?i)error|except|raise|warn", text))),
    ("digits and numbers", lambda text: any(char.isdigit() for char in text)),
    ("the keyword def", lambda text: text.strip() == "def"),
    ("new lines followed by indentation", lambda text: text.startswith("\n") and text.endswith(" ")),
    ("words about files, folders and paths", lambda text: bool(re.search("file|dir|path", text.lower()))),
    ("the word if, else or elif", lambda text: text.strip() in ("if", "else", "elif")),
)  # fmt: skip
STEEPNESS, THRESHOLDS = (0.5, 1, 1.5, 2, 3, 4), (-2, -1, 0, 1, 2, 3, 4, 6, 8)


def planted_contexts(tokenizer, corpus, length, tops, others):
    """For each planted feature: contexts (lists of token texts) and its activations [C, T]."""
    windows = []
    for file in sorted(Path(corpus).glob("*.py")):
        ids = tokenizer(file.read_text(errors="ignore"), add_special_tokens=False)["input_ids"]
        windows += [ids[start : start + length] for start in (0, 500, 1500) if len(ids) >= start + length]
    texts = [prompts.token_texts(tokenizer, ids) for ids in windows]
    rng = torch.Generator().manual_seed(0)
    for _, rule in PLANTED:
        order = [texts[place] for place in torch.randperm(len(texts), generator=rng).tolist()]
        firing = [context for context in order if any(map(rule, context))][:tops]
        chosen = firing + [context for context in order if context not in firing][:others]
        yield chosen, torch.tensor([[float(rule(text)) for text in context] for context in chosen])


def table(readings, truths):
    """Rows (how the values are read, mean right, mean wrong) from readings[way][explanation, feature]."""
    count = len(truths)

    def judged(values, features=range(count)):
        """Mean correlation for the right and for the next feature's explanation."""
        parts = []
        for step in (0, 1):
            found = [explain.correlation(values((f + step) % count, f), truths[f]) for f in features]
            parts.append(statistics.mean(value or 0.0 for value in found))
        return parts

    def expected(way):
        return lambda e, f: explain.simulated(readings[way][e, f])

    def odds(e, f):
        return explain._log_odds(readings["0"][e, f]) - explain._log_odds(readings["0"]["neutral", f])

    def sigmoid(steepness, threshold):
        return lambda e, f: torch.sigmoid(steepness * odds(e, f) - threshold)

    yield "expected value, earlier values `unknown` (Bills et al.)", *judged(expected("unknown"))
    yield "expected value, earlier values `0`", *judged(expected("0"))
    yield (
        "the same, minus the neutral one",
        *judged(
            lambda e, f: (
                explain.simulated(readings["0"][e, f]) - explain.simulated(readings["0"]["neutral", f])
            )
        ),
    )
    yield "log odds of non-zero, minus the neutral ones", *judged(odds)
    yield "sigmoid(2 x - 4) of these", *judged(sigmoid(2, 4))
    even, odd = range(0, count, 2), range(1, count, 2)
    grid = list(itertools.product(STEEPNESS, THRESHOLDS))
    best = max(grid, key=lambda pair: judged(sigmoid(*pair), even)[0])
    yield f"sigmoid({best[0]:g} x - {best[1]:g}), chosen on the even features", *judged(sigmoid(*best))
    yield "    the odd features alone", *judged(sigmoid(*best), odd)
    yield "    sigmoid(2 x - 4), the odd features alone", *judged(sigmoid(2, 4), odd)
    chosen = explain.STEEPNESS, explain.THRESHOLD
    yield f"the suite's: sigmoid({chosen[0]:g} x - {chosen[1]:g})", *judged(sigmoid(*chosen))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="LLM that simulates: folder or .gguf")
    parser.add_argument("--tokenizer", default=str(ROOT / "inputs/smollm2"), help="of the planted contexts")
    parser.add_argument("--corpus", default=str(ROOT / "inputs/stdlib"), help="folder of source files")
    parser.add_argument("--length", type=int, default=48, help="tokens in a context")
    parser.add_argument("--tops", type=int, default=2, help="contexts per feature where it fires")
    parser.add_argument("--others", type=int, default=1, help="contexts per feature drawn at random")
    parser.add_argument("--save", help="file for the readings; a run goes on with what it holds")
    args = parser.parse_args()
    planted = list(
        planted_contexts(
            models.load_tokenizer(args.tokenizer), args.corpus, args.length, args.tops, args.others
        )
    )
    truths = [truth_CT for _, truth_CT in planted]
    readings, seconds = {"0": {}, "unknown": {}}, {"0": 0.0, "unknown": 0.0}
    if args.save and Path(args.save).exists():
        readings, seconds = torch.load(args.save, weights_only=True)
    if len(readings["unknown"]) < 2 * len(planted):
        interpreter = Interpreter(models.load_model(args.model), models.load_tokenizer(args.model))
        for earlier in readings:
            interpreter.earlier = earlier
            for f, (contexts, _) in enumerate(planted):
                started = time.process_time()
                if (f, f) in readings[earlier]:
                    continue
                visible = [[prompts.visible(text) for text in context] for context in contexts]
                for e in (f, (f + 1) % len(planted), *(["neutral"] if earlier == "0" else [])):
                    text = prompts.NEUTRAL if e == "neutral" else PLANTED[e][0]
                    readings[earlier][e, f] = interpreter.readings(text, visible, len(visible))
                print(f"earlier values {earlier}: feature {f + 1} of {len(planted)}", file=sys.stderr)
                seconds[earlier] += time.process_time() - started
                if args.save:
                    torch.save((readings, seconds), args.save)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"{len(planted)} features, {len(truths[0])} contexts of {args.length} tokens each; "
        f"python {' '.join(sys.argv)}"
    )
    print(
        json.dumps(
            {f"processor seconds with {earlier}": round(value, 1) for earlier, value in seconds.items()}
        )
    )
    print("| how the values are read | right | wrong |\n|---|---|---|")
    for name, right, wrong in table(readings, truths):
        print(f"| {name} | {right:.2f} | {wrong:.2f} |")


if __name__ == "__main__":
    main()
