"""The feature browser: everything there is to see about one run or several, in one HTML file.

python -m sae.report samples.pt --dataset_path tokens --autoencoder_path runs/layer10/50000.pt
python -m sae.report layer4.pt layer10.pt layer20.pt --dataset_path tokens
"""

from sae import cli
from sae.report import build


def parse_args():
    parser = cli.Parser(__doc__)
    parser.prog = "python -m sae.report"
    add, some = parser.add_argument, {"type": cli.path, "nargs": "+"}
    add("samples", help="interpretation samples (.pt), one file or several of one dataset", **some)
    add("--dataset_path", type=cli.path, default="./tokenized_dataset", help="their dataset")
    add("--explanations", help="journal of each; default: <samples stem>.explanations.jsonl, if any", **some)
    add("--autoencoder_path", help="checkpoint of each; default: the one that it names, if there", **some)
    add("--metrics", help="metrics.jsonl of each run; default: the one beside the checkpoint", **some)
    add("--contexts", type=cli.whole_number(1), default=12, help="per kind; fewer to stay under 30 MB")
    add("--out", type=cli.path, default="report.html", help="HTML file to write")
    return parser, parser.parse_args()


def main(args):
    from sae.artifacts import atomic_write, check_writable

    check_writable("--out", args.out, "a page", lambda path: path.read_bytes()[:9].lower() == b"<!doctype")
    belonging = args.explanations, args.autoencoder_path, args.metrics
    page = build(args.samples, args.dataset_path, *belonging, args.contexts)
    with atomic_write(args.out) as handle:
        size = handle.write(page.encode())
    print(f"{args.out}: {size / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    PARSER, ARGS = parse_args()
    with PARSER.friendly_errors():
        main(ARGS)
