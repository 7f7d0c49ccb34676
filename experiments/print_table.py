"""Print explained features as a table, read back from ElasticSearch: best score first.

python experiments/print_table.py localhost:9200 INDEX --api_key @key.txt --query import
"""

import contextlib
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sae import cli

FIELDS = ["dim", "score", "control", "interpretation", "tokens"]


def main():
    parser = cli.Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("server_address", help="ElasticSearch: [http(s)://]host[:port]")
    parser.add_argument("index", help="what interpret_autoencoder_deepspeed.py wrote to")
    parser.add_argument("--api_key", default="none", help="its API key, or @FILE with the key")
    parser.add_argument("--ssl_cert", help="file with the server's certificate authority")
    parser.add_argument("--insecure", action="store_true", help="do not verify the server's certificate")
    parser.add_argument("--query", help="query string; looks into tokens and interpretations")
    parser.add_argument(
        "--rows", type=cli.whole_number(1, 10_000), default=50, help="at most so many features"
    )
    args = parser.parse_args()
    with parser.friendly_errors():
        from elasticsearch import ApiError, AuthorizationException, TransportError

        from sae import InputError
        from sae.explanations.elastic import connect

        client = connect(args.server_address, args.api_key, args.ssl_cert, args.insecure)
        try:
            with contextlib.suppress(
                AuthorizationException
            ):  # a key that only reads waits for the next refresh
                client.indices.refresh(index=args.index)
            order = [{"score": {"order": "desc", "missing": "_last"}}, {"dim": "asc"}]
            answer = client.search(
                index=args.index, q=args.query, size=args.rows, sort=order, source_includes=FIELDS
            )
        except (ApiError, TransportError) as err:
            raise InputError(f"an index of explanations needed, {args.index}: {err}") from None
    width = max(shutil.get_terminal_size((150, 24)).columns, 80)
    line = f"{{:>7}} {{:>6}} {{:>7}}  {{:{width // 2}.{width // 2}}}  {{}}"
    print(line.format("feature", "score", "control", "interpretation", "tokens"))
    for found in (hit["_source"] for hit in answer["hits"]["hits"]):
        numbers = ("-" if found[name] is None else f"{found[name]:.2f}" for name in ("score", "control"))
        text, tokens = " ".join(found["interpretation"].split()), " ".join(found["tokens"])
        print(line.format(found["dim"], *numbers, text, tokens)[:width])
    print(f"{len(answer['hits']['hits'])} of {answer['hits']['total']['value']} features")


if __name__ == "__main__":
    main()
