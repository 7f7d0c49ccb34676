"""Kept tokens per second and peak memory of tokenising, beside two usual ways, on the same documents.

    python benchmarks/tokenise.py --tokenizer inputs/smollm2 --corpus inputs/stdlib

Kept tokens: the first --min_tokens of each document that has as many. The ways (a) and (b) have the
tokenizer truncate; it reads the whole of each document all the same. Rates of the suite hold reading and
writing; those of its processes also the second that starting them takes, over --copies times the corpus.
"""

import argparse
import multiprocessing
import os
import platform
import re
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

FLAGS = {
    "chunk_documents": False, "add_bos": False, "data_dir": None, "dataset_config": None, "split": "train",
    "text_field": None, "seed": 0,
}  # fmt: skip


def read_corpus(folder):
    """The texts of all files that are UTF-8 without NUL."""
    from sae.tokens import sources

    files = sources.open_source(str(folder))
    return [text for path in files.paths for text in files.read(path) if isinstance(text, str)]


def one_by_one(tokenizer, texts, length):
    encoded = (tokenizer(t, truncation=True, max_length=length, add_special_tokens=False) for t in texts)
    return sum(len(each["input_ids"]) == length for each in encoded)


def batched_map(tokenizer, texts, length):
    import datasets

    def encode(batch):
        return tokenizer(batch["text"], truncation=True, max_length=length, add_special_tokens=False)

    dataset = datasets.Dataset.from_dict({"text": texts}).map(encode, batched=True, remove_columns=["text"])
    return sum(len(ids) == length for ids in dataset["input_ids"])


def write_shards(folder, texts, megabytes):
    """The texts, as often as `megabytes` need, in parquet files of about 10 MB of text."""
    folder.mkdir()
    count = int(len(texts) * megabytes * 1e6 / sum(len(text.encode()) for text in texts))
    shards = max(2, int(megabytes / 10))
    for shard in range(shards):
        rows = ({"text": f"# {n}\n{texts[n % len(texts)]}"} for n in range(shard, count, shards))
        _write_parquet(folder / f"{shard}.parquet", rows)
    return folder


def _write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        batch = []
        for row in rows:
            batch.append(row)
            if len(batch) == 200:
                writer.write_table(pa.Table.from_pylist(batch))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch))


def suite(corpus, out, tokenizer_path, length, contexts, processes):
    """Write contexts; returns seconds, CPU seconds, and the peak memory of the largest worker in MB."""
    from sae.tokens import write_dataset

    flags = FLAGS | {
        "num_files": processes,
        "num_samples_per_file": contexts // processes,
        "min_tokens": length,
        "num_processes": processes,
        "tokenizer_name": tokenizer_path,
        "dataset_name": str(corpus),
    }
    start = time.perf_counter(), cpu_seconds()
    write_dataset(out, flags, tokenizer_path, lambda: False)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    return time.perf_counter() - start[0], cpu_seconds() - start[1], peak


def cpu_seconds():
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def apart(function, *arguments):
    """Run in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", default="inputs/smollm2")
    parser.add_argument("--corpus", default="inputs/stdlib")
    parser.add_argument("--min_tokens", type=int, default=256)
    parser.add_argument("--copies", type=int, default=96, help="of the corpus, for the rates of processes")
    parser.add_argument("--memory", type=int, nargs="*", default=[10, 30, 300], help="megabytes of text")
    args = parser.parse_args()

    import datasets
    import tokenizers
    import transformers

    print(f"python {' '.join(sys.argv)}")
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(f"{os.cpu_count()} cores, {cpu[1] if cpu else 'unknown'}, Python {platform.python_version()}")
    print(
        f"tokenizers {tokenizers.__version__}, transformers {transformers.__version__}, "
        f"datasets {datasets.__version__}"
    )
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    texts, length = read_corpus(args.corpus), args.min_tokens
    size = sum(len(text.encode()) for text in texts)
    rates, cpu_rates = {}, {}

    def note(name, kept, seconds, cpu):
        rates[name], cpu_rates[name] = kept * length / seconds, kept * length / cpu
        print(f"{name:30s} {rates[name]:>9,.0f} kept tokens/s, {cpu_rates[name]:>9,.0f} per CPU second")
        print(f"{'':30s} ({kept} contexts in {seconds:.1f} s, {cpu:.1f} CPU seconds)", flush=True)

    for name, way in (("(a) one document at a time", one_by_one), ("(b) datasets.map, batched", batched_map)):
        start = time.perf_counter(), cpu_seconds()
        kept = way(tokenizer, texts, length)
        note(name, kept, time.perf_counter() - start[0], cpu_seconds() - start[1])
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        tokenizer.save_pretrained(scratch / "tokenizer")
        shards = write_shards(scratch / "shards", texts, size * args.copies / 1e6)
        contexts = kept * args.copies * 9 // 10
        for processes in (1, 2):
            arguments = (str(scratch / "tokenizer"), length, contexts, processes)
            seconds, cpu, _peak = apart(suite, shards, scratch / f"out{processes}", *arguments)
            name = f"suite, {processes} process{'es' * (processes > 1)}"
            note(name, contexts // processes * processes, seconds, cpu)
        for other in list(rates)[:2]:
            wall, cpu = (each["suite, 1 process"] / each[other] for each in (rates, cpu_rates))
            print(f"suite, 1 process / {other}: {wall:.1f} ({cpu:.1f} per CPU second)")
        print(f"2 processes / 1 process: {rates['suite, 2 processes'] / rates['suite, 1 process']:.2f}")
        for megabytes in args.memory:
            shards = write_shards(scratch / f"{megabytes}", texts, megabytes)
            contexts = int(kept * megabytes * 1e6 / size * 0.8)
            *_seconds, memory = apart(
                suite, shards, scratch / f"m{megabytes}", str(scratch / "tokenizer"), length, contexts, 1
            )
            print(f"peak memory of a worker over {megabytes} MB of text: {memory:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
