"""How well each reading of an explanation recognises it: correlation with planted features.

    python benchmarks/simulation.py --model inputs/smollm2

Features of known meaning are planted in real code: each fires on the tokens that a rule picks, lexical ones
by their text, contextual ones by what stands beside. Every reading sees the same contexts; `wrong` is the
next feature's explanation on them. How to read was chosen on the features without a star.
"""

import argparse
import itertools
import os
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
from sae.explanations import prompts  # noqa: E402
from sae.explanations.evidence import Context  # noqa: E402
from sae.explanations.interpreter import Interpreter  # noqa: E402
from sae.explanations.scoring import correlation  # noqa: E402
from sae.explanations.simulation import Simulator  # noqa: E402

# A rule: the tokens of a context -> for each whether the feature fires on it.


def looks(pattern):
    return lambda texts: [bool(re.search(pattern, text)) for text in texts]


def is_one_of(*words):
    return lambda texts: [text.strip() in words for text in texts]


def after(word):
    """The first token with something to see after the word, in its line."""

    def rule(texts):
        fires, armed = [], False
        for text in texts:
            fires.append(armed and bool(text.strip()))
            armed = text.strip() == word or (armed and not text.strip() and "\n" not in text)
        return fires

    return rule


def before(word):
    def rule(texts):
        following = [*(text.strip() for text in texts[1:]), ""]
        return [bool(text.strip()) and then == word for text, then in zip(texts, following, strict=True)]

    return rule


def comment(texts):
    fires, inside = [], False
    for text in texts:
        inside = inside and "\n" not in text
        fires.append(inside and any(char.isalpha() for char in text))
        inside = inside or text.strip().startswith("#")
    return fires


def self_before_a_dot(texts):
    return [a.strip() == "self" and b.strip() == "." for a, b in zip(texts, [*texts[1:], ""], strict=True)]


def attribute(texts):
    pairs = ["".join(pair).strip() for pair in itertools.pairwise(texts)]
    return [False, False, *(pair == "self." for pair in pairs[:-1])]


LEXICAL = {
    "the keyword import": is_one_of("import"),
    "opening parentheses": looks(r"\("),
    "the name self": is_one_of("self"),
    "underscores": looks("_"),
    "the keyword return": is_one_of("return"),
    "quotation marks that begin or end a string": looks("['\"]"),
    "words about errors and exceptions": looks("(?i)error|except|raise|warn"),
    "digits and numbers": looks(r"\d"),
    "the keyword def": is_one_of("def"),
    "new lines followed by indentation": looks(r"^\n(?s:.)* $"),
    "words about files, folders and paths": looks("(?i)file|dir|path"),
    "the word if, else or elif": is_one_of("if", "else", "elif"),
    "equals signs": looks("="),
    "the words True, False and None": is_one_of("True", "False", "None"),
    "closing brackets": looks(r"[)\]]"),
    "the words try, return and raise": is_one_of("try", "return", "raise"),
    "commas": looks(","),
    "colons*": looks(":"),
    "the keywords for and while*": is_one_of("for", "while"),
    "the words is, not and in*": is_one_of("is", "not", "in"),
    "dots*": looks(r"\."),
    "words about time and dates*": looks("(?i)time|date|year|month|day|hour|second"),
    "names of types such as int, str and list*": is_one_of("int", "str", "list", "dict", "bytes", "float"),
    "words about strings and text*": looks("(?i)str|text|char"),
    "plus and minus signs*": is_one_of("+", "-", "+=", "-="),
}
CONTEXTUAL = {
    "the name after def": after("def"),
    "the name after import": after("import"),
    "the name after class": after("class"),
    "the words of a comment": comment,
    "an attribute after self.": attribute,
    "the value after return": after("return"),
    "the variable after for*": after("for"),
    "the name after from*": after("from"),
    "the token before an opening parenthesis*": before("("),
    "self before a dot*": self_before_a_dot,
    "the token after an equals sign*": after("="),
    "what follows the word raise*": after("raise"),
}
WAYS = ("tokens", "lines", "contrastive", "expected")


def planted(tokenizer, corpus, length, firing, others):
    """{explanation: Contexts} of each planted feature, drawn at random."""
    windows = []
    for file in sorted(Path(corpus).glob("*.py")):
        ids = tokenizer(file.read_text(errors="ignore"), add_special_tokens=False)["input_ids"]
        windows += [ids[start : start + length] for start in (0, 500, 1500) if len(ids) >= start + length]
    texts = [prompts.token_texts(tokenizer, ids) for ids in windows]
    rng, found = torch.Generator().manual_seed(0), {}
    for explanation, rule in (LEXICAL | CONTEXTUAL).items():
        order = [texts[place] for place in torch.randperm(len(texts), generator=rng).tolist()]
        on = [context for context in order if any(rule(context))][:firing]
        chosen = on + [context for context in order if context not in on][:others]
        found[explanation] = [
            Context(row, context, torch.tensor([float(fires) for fires in rule(context)]))
            for row, context in enumerate(chosen)
        ]
    return found


def reading(interpreter, way):
    """(explanation, contexts) -> simulated activations, read as `way` says."""
    simulator = Simulator(interpreter, "contrastive" if way == "lines" else way)
    return simulator.by_lines if way == "lines" else simulator


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="LLM that simulates: folder or .gguf")
    parser.add_argument("--dtype", default="auto", help="of the LLM")
    parser.add_argument("--tokenizer", default=str(ROOT / "inputs/smollm2"), help="of the planted contexts")
    parser.add_argument("--corpus", default=str(ROOT / "inputs/stdlib"), help="folder of source files")
    parser.add_argument("--length", type=int, default=48, help="tokens in a context")
    parser.add_argument("--firing", type=int, default=3, help="contexts per feature where it fires")
    parser.add_argument("--others", type=int, default=3, help="contexts per feature drawn at random")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="readings")
    args = parser.parse_args()
    made = planted(models.load_tokenizer(args.tokenizer), args.corpus, args.length, args.firing, args.others)
    interpreter = Interpreter(
        models.load_model(args.model, dtype=args.dtype), models.load_tokenizer(args.model)
    )
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"python {' '.join(sys.argv)}")
    print(f"{len(LEXICAL)} lexical and {len(CONTEXTUAL)} contextual features")
    head = "".join(f" {way} right | wrong |" for way in args.ways)
    print(f"| planted |{head}\n|---|{'---|---|' * len(args.ways)}")
    seconds, means = dict.fromkeys(args.ways, 0.0), {}
    for kind, features in (("lexical", LEXICAL), ("contextual", CONTEXTUAL)):
        names, rows = list(features), []
        simulators = {way: reading(interpreter, way) for way in args.ways}
        for name, other in zip(names, [*names[1:], names[0]], strict=True):
            truth_CT, row = torch.stack([context.values_T for context in made[name]]), []
            for way, simulate in simulators.items():
                started = time.monotonic()
                for text in (name, other):
                    row.append(correlation(simulate(text.rstrip("*"), made[name]), truth_CT) or 0.0)
                seconds[way] += time.monotonic() - started
            rows.append(row)
            print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |", flush=True)
        for title, chosen in (
            (kind, rows),
            (f"{kind}*", [r for n, r in zip(names, rows, strict=True) if n[-1] == "*"]),
        ):
            means[title] = [statistics.mean(column) for column in zip(*chosen, strict=True)]
    for title, values in means.items():
        print(f"| **mean, {title}** | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    each = {way: round(value / 2 / len(made), 1) for way, value in seconds.items()}
    print(f"seconds for each explanation: {each}")


if __name__ == "__main__":
    main()
