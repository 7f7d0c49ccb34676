"""Print explained features as a table, read back from ElasticSearch: best score first.

python experiments/print_table.py localhost:9200 INDEX --api_key @key.txt --query import
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sae import cli


def main():
    parser = cli.Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("server_address", help="ElasticSearch: [http(s)://]host[:port]")
    parser.add_argument("index", help="what interpret_autoencoder_deepspeed.py wrote to")
    parser.add_argument("--api_key", default="none", help="its API key, or @FILE with the key")
    parser.add_argument("--ssl_cert", type=cli.path, help="file with the server's certificate authority")
    parser.add_argument("--insecure", action="store_true", help="do not verify the server's certificate")
    parser.add_argument("--query", help="query string; looks into tokens and interpretations")
    parser.add_argument(
        "--rows", type=cli.number(int, least=1, most=10_000), default=50, help="at most so many features"
    )
    args = parser.parse_args()
    with parser.friendly_errors():
        from sae import search

        found = search(
            args.server_address, args.index, args.query, args.rows, args.api_key, args.ssl_cert, args.insecure
        )
    width = max(shutil.get_terminal_size((150, 24)).columns, 80)
    line = f"{{:>7}} {{:>6}} {{:>7}} {{:>8}}  {{:{width // 2}.{width // 2}}}  {{}}"
    figures = ("score", "control", "counting")
    print(line.format("feature", *figures, "interpretation", "tokens"))
    for one in found:
        numbers = ("-" if one.get(name) is None else f"{one[name]:.2f}" for name in figures)
        text, tokens = " ".join(one["interpretation"].split()), " ".join(one["tokens"])
        print(line.format(one["dim"], *numbers, text, tokens)[:width])
    print(f"{'the first ' if len(found) == args.rows else ''}{len(found)} features")


if __name__ == "__main__":
    main()
