"""The feature browser at size: how large the page of 5,000 features is, how fast it opens and answers.

    HF_HUB_OFFLINE=1 python benchmarks/report.py --tokenizer inputs/smollm2 --corpus inputs/stdlib

The contexts are real source code; which of them belong to which feature, where it fires and what was
simulated is drawn. Every feature is explained, with 20 contexts shown and 20 scored. Needs Chromium and its
driver (Debian: apt install chromium chromium-driver).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "report")]


def write_inputs(folder, tokenizer_name, corpus, num_features, length, rows=30_000):
    """A dataset of real contexts, and samples and explanations of `num_features` made-up features."""
    import torch
    from conftest import write_dataset

    from sae.artifacts import fingerprint
    from sae.explanations import token_texts
    from sae.models import load_tokenizer
    from sae.samples import Samples, save_samples

    tokenizer, ids, documents = load_tokenizer(tokenizer_name), [], []
    for number, file in enumerate(sorted(Path(corpus).rglob("*.py"))):
        tokens = tokenizer(file.read_text(errors="ignore")[:60_000], add_special_tokens=False)["input_ids"]
        windows = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
        ids, documents = ids + windows, documents + [number] * len(windows)
        if len(ids) >= rows:
            break
    write_dataset(folder / "tokens", ids, documents, tokenizer_name)
    info = json.loads((folder / "tokens" / "tokenized_dataset.json").read_text())
    rng = torch.Generator().manual_seed(0)
    fires = torch.rand(num_features, 52, length, generator=rng) < 0.06
    acts = torch.rand(num_features, 52, length, generator=rng) * 10 * fires
    samples = Samples(
        {"model_name": tokenizer_name, "hookpoint": "model.layers.10.mlp.act_fn", "act_vec_size": 1536,
         "dict_vec_size": num_features, "trained_tokens": 0, "log_freq_lower": -2.0, "log_freq_upper": -0.1},
        info["fingerprint"], "none", len(ids) * length,
        torch.rand(num_features, generator=rng) * -1.8 - 0.15, torch.arange(num_features), acts.amax((1, 2)),
        torch.randint(len(ids), (num_features, 52), generator=rng), acts.half(),
        torch.tensor([0] * 24 + [1] * 12 + [2] * 16, dtype=torch.int8).repeat(num_features, 1),
    )  # fmt: skip
    save_samples(folder / "samples.pt", samples)
    made_from = fingerprint(folder / "samples.pt")
    texts = [token_texts(tokenizer, row) for row in ids]
    with open(folder / "samples.explanations.jsonl", "w") as handle:
        for dim, rows_K in enumerate(samples.rows.tolist()):
            text = f"the {dim}th thing that a made-up feature might fire on in a file of source code"
            contexts = [{"row": row, "text": "".join(texts[row]), "marks": []} for row in rows_K]
            simulated = torch.rand(20, length, generator=rng) ** 8
            document = {
                "dim": dim, "interpretation": text, "score": dim % 97 / 97, "control": 0.01, "counting": 0.5,
                "explained_by": ("counted", "text", "lines")[dim % 3], "interval": [0.1, 0.9],
                "candidates": [{"interpretation": text, "explained_by": hand, "judged": 0.5}
                               for hand in ("counted", "text", "lines")],
                "shown": contexts[:20], "scored": contexts[20:24] + contexts[36:],
                "simulated": [[round(value, 3) for value in row] for row in simulated.tolist()],
            }  # fmt: skip
            handle.write(json.dumps(document | {"samples_fingerprint": made_from}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--features", type=int, default=5000)
    parser.add_argument("--length", type=int, default=64, help="tokens of a context")
    args = parser.parse_args()
    from test_report_browser import chromium

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, args.tokenizer, args.corpus, args.features, args.length)
        started = time.monotonic()
        command = [sys.executable, "-m", "sae.report", str(folder / "samples.pt"), "--dataset_path"]
        subprocess.run(
            [*command, str(folder / "tokens"), "--out", str(folder / "report.html")], cwd=ROOT, check=True
        )
        built = time.monotonic() - started
        opened, unpacked, keys = [], [], []
        for _ in range(3):
            with chromium() as browser:
                browser.get((folder / "report.html").as_uri())
                browser.set_script_timeout(30)
                browser.execute_async_script("contexts(runs[0]).then(arguments[0].bind(null, 1))")
                marks = browser.execute_script(
                    "const marks = performance.getEntriesByType('mark');"
                    "return Object.fromEntries(marks.map((mark) => [mark.name, mark.startTime]))"
                )
                opened.append(marks["list"] / 1000)
                unpacked.append(marks["contexts"] / 1000)
                keys += browser.execute_script(
                    """const box = document.getElementById("search"), times = [];
                    for (const text of ["s", "se", "sel", "self", "sel", "", "th", "the", "the 1"]) {
                      box.value = text;
                      const start = performance.now();
                      box.dispatchEvent(new Event("input"));
                      document.body.getBoundingClientRect();
                      times.push(performance.now() - start);
                    }
                    return times;"""
                )
        size = (folder / "report.html").stat().st_size / 1e6
    print(f"{args.features} features, contexts of {args.length} tokens; {os.cpu_count()} cores")
    print(f"written in {built:.1f} s, {size:.1f} MB")
    print(f"list usable after {max(opened):.2f} s (slowest of 3), contexts after {max(unpacked):.2f} s")
    print(f"a key typed in the search: median {statistics.median(keys):.0f} ms, slowest {max(keys):.0f} ms")


if __name__ == "__main__":
    main()
