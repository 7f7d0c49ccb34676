"""Turn text into a tokenised dataset: contexts of --min_tokens tokens each, in num_files Arrow files.

    python generate_tokenized_dataset.py 16 10000 --min_tokens 256 --num_processes 16 --data_dir data/python

The same command goes on where it was when it is stopped or killed; `--save_path` appears when all is there.
"""

import sys
import time

from sae import cli


def parse_args():
    parser = cli.Parser(__doc__)
    count = cli.whole_number(1)
    add = parser.add_argument
    add("num_files", type=count, help="Arrow files to write, a multiple of --num_processes")
    add("num_samples_per_file", type=count, help="contexts in each file")
    add("--save_path", default="./tokenized_dataset", help="folder to write")
    add(
        "--min_tokens",
        type=count,
        default=64,
        help="tokens of a context: the first of each long enough document",
    )
    add("--num_processes", type=count, default=1, help="worker processes; they read disjoint documents")
    add("--tokenizer_name", default=cli.CODELLAMA, help="hub name, folder or .gguf file")
    add(
        "--dataset_name",
        default="bigcode/the-stack-dedup",
        help="hub name; local file or folder (parquet, arrow, json(l), csv, or source files, one document "
        "each); or address of data files, as in http://host/part-{00..15}.jsonl.gz",
    )
    add("--chunk_documents", action="store_true", help="every full window of a document, not the first alone")
    add("--data_dir", nargs="+", help="folders within the dataset; the documents of several alternate")
    add("--dataset_config", help="configuration of a hub dataset")
    add("--split", default="train", help="split of a dataset that has several")
    add("--text_field", help="column that holds the text (default: found: content, text, code, ...)")
    add(
        "--seed",
        type=cli.whole_number(0),
        default=0,
        help="shuffles the order in which files (shards) are read",
    )
    args = parser.parse_args()
    if args.num_files % args.num_processes:
        came = f"{args.num_files} and {args.num_processes} came"
        parser.error(f"num_files needs to be a multiple of --num_processes, {came}")
    return parser, args


def main():
    parser, args = parse_args()
    with parser.friendly_errors():
        generate(**vars(args))


def generate(save_path, **flags):
    from tqdm import tqdm

    from sae import InputError, models, tokenise

    folder = tokenise.working_folder(save_path)
    if tokenise.check_save_path(save_path, flags):
        return print(f"{save_path} is complete already, made with the same flags")
    tokenizer = models.load_tokenizer(flags["tokenizer_name"])
    if not tokenizer.is_fast:
        raise InputError(f"a fast tokenizer needed, {flags['tokenizer_name']} is not")
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    plan = tokenise.make_plan(flags, tokenizer_json)
    folder.mkdir(parents=True, exist_ok=True)
    with cli.stop_requested() as stopping, tokenise.lock(folder / "lock"):
        states = tokenise.start_or_resume(folder, plan, tokenizer_json)
        rows = plan["num_files"] * plan["num_samples_per_file"]
        there = sum(state.files * plan["num_samples_per_file"] + state.rows for state in states)
        if there:
            files = sum(state.files for state in states)
            print(f"going on from {folder}: {files} of {plan['num_files']} files, {there} of {rows} contexts")
        start = time.monotonic()
        with tqdm(total=rows, initial=there, unit=" contexts", smoothing=0.1) as bar:

            def show(counts):
                bar.update(max(tokenise.total(counts, "contexts") - bar.n, 0))
                documents = max(tokenise.total(counts, "documents"), 1)
                rate = (bar.n - there) * plan["min_tokens"] / (time.monotonic() - start)
                share = tokenise.total(counts, "long_enough") / documents
                bar.set_postfix_str(
                    f"{rate:,.0f} tokens/s, {share:.0%} of documents long enough", refresh=False
                )

            outcome, counts = tokenise.run_workers(folder, plan, stopping, show)
        if "short" in outcome.values():
            tokenise.refuse_short(folder, plan, outcome, counts)
        if "stopped" in outcome.values():
            print(f"stopped; what is written is kept in {folder}, the same command goes on from there")
            sys.exit(130)
        info = tokenise.finish(folder, save_path, plan, len(tokenizer))
        seconds = time.monotonic() - start
        skipped = "".join(f", {n} skipped ({reason})" for reason, n in info["documents_skipped"].items())
        print(
            f"wrote {rows} contexts of {plan['min_tokens']} tokens in {plan['num_files']} files to "
            f"{save_path} in {seconds:.1f} s "
            f"({(rows - there) * plan['min_tokens'] / seconds:,.0f} tokens/s); "
            f"{info['documents']} documents, {info['documents_long_enough']} long enough{skipped}"
        )


if __name__ == "__main__":
    main()
