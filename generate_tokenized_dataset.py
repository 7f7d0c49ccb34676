"""Turn text into a tokenised dataset: contexts of --min_tokens tokens each, in num_files Arrow files.

    python generate_tokenized_dataset.py 16 10000 --min_tokens 256 --num_processes 16 --data_dir data/python

The same command goes on where it was when it is stopped or killed; `--save_path` appears when all is there.
"""

import sys
import tempfile

from sae import cli


def parse_args():
    parser = cli.Parser(__doc__)
    count = cli.whole_number(1)
    add = parser.add_argument
    add("num_files", type=count, help="Arrow files to write, a multiple of --num_processes")
    add("num_samples_per_file", type=count, help="contexts in each file")
    add("--save_path", type=cli.path, default="./tokenized_dataset", help="folder to write")
    add(
        "--min_tokens",
        type=count,
        default=64,
        help="tokens of a context: the first of each long enough document",
    )
    add("--num_processes", type=count, default=1, help="worker processes; they read disjoint documents")
    add("--tokenizer_name", type=cli.path, default=cli.CODELLAMA, help="hub name, folder or .gguf file")
    add(
        "--dataset_name",
        type=cli.path,
        default="bigcode/the-stack-dedup",
        help="hub name; local file or folder (parquet, arrow, json(l), csv, or source files, one document "
        "each); or address of data files, as in http://host/part-{00..15}.jsonl.gz",
    )
    add("--chunk_documents", action="store_true", help="every full window of a document, not the first alone")
    add("--add_bos", action="store_true", help="each context begins with the tokenizer's begin-of-text token")
    add(
        "--data_dir",
        nargs="+",
        type=cli.path,
        help="folders within the dataset; the documents of several alternate",
    )
    add("--dataset_config", help="configuration of a hub dataset")
    add("--split", default="train", help="split of a dataset that has several")
    add(
        "--text_field",
        nargs="+",
        metavar="COLUMN",
        help="column of the text, several are joined; a column of chat messages goes through the tokenizer's "
        "chat template (default: found: content, text, code, ...)",
    )
    add("--seed", type=cli.SEED, default=0, help="seed of the order in which files (shards) are read")
    add("--trust_remote_code", **cli.TRUST_REMOTE_CODE)
    args = parser.parse_args()
    if args.add_bos and args.min_tokens < 2:
        parser.error("--min_tokens needs at least 2 with --add_bos, 1 came")
    if args.num_files % args.num_processes:
        came = f"{args.num_files} and {args.num_processes} came"
        parser.error(f"num_files needs to be a multiple of --num_processes, {came}")
    return parser, args


def main():
    parser, args = parse_args()
    flags = vars(args)
    save_path, trust_remote_code = flags.pop("save_path"), flags.pop("trust_remote_code")
    with parser.friendly_errors(), cli.stop_requested() as stopping:
        from sae import tokens

        tokens.read_finished(save_path, flags)
        tokens.refuse_missing(args.dataset_name)
        from sae import InputError, models  # imports torch and transformers, which takes seconds

        tokenizer = models.load_tokenizer(args.tokenizer_name, trust_remote_code)
        if not tokenizer.is_fast:
            raise InputError(f"a fast tokenizer needed, {args.tokenizer_name} has none")
        bos = tokenizer.bos_token_id
        if args.add_bos and bos is None:
            raise InputError(f"a tokenizer with a begin-of-text token needed, {args.tokenizer_name} has none")
        if not args.add_bos and bos is not None and tokenizer("a")["input_ids"][0] == bos:
            print(
                f"this tokenizer puts {tokenizer.bos_token} before a text: --add_bos does so in each context"
            )
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(f"{folder}/copy")  # a folder with the rights that new folders have
            said, done = tokens.write_dataset(save_path, flags, f"{folder}/copy", stopping, bos)
    print(said)
    return 0 if done else cli.STOPPED


if __name__ == "__main__":
    sys.exit(main())
