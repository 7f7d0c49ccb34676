"""Explain the features in interpretation samples with an LLM, score the explanations, index them.

    deepspeed --num_gpus 4 interpret_autoencoder_deepspeed.py localhost:9200 @key.txt --num_gpus 4

Every finished feature lies in <samples stem>.explanations.jsonl before it is sent: after a crash, or when
ElasticSearch was down, the same command goes on where the last one stopped.
"""

import contextlib
import sys
import time
from pathlib import Path

from sae import cli, processes

COUNT = cli.whole_number(1)


def parse_args():
    parser = processes.Parser(__doc__)
    add = parser.add_argument
    add("server_address", help="ElasticSearch: [http(s)://]host[:port]")
    add("api_key", help="its API key, or @FILE with the key (the launcher logs its command line: use @FILE)")
    add(
        "--dataset_path", type=cli.path, default="./tokenized_dataset", help="folder of the tokenised dataset"
    )
    add(
        "--interpretation_samples_path",
        type=cli.path,
        default="./interpretation_samples.pt",
        help="samples to explain",
    )
    add("--interpretation_model_name", type=cli.path, default="codellama/CodeLlama-34b-Instruct-hf",
        help="LLM that explains: hub name, folder or .gguf")  # fmt: skip
    add("--num_gpus", type=COUNT, default=4, help="processes that deepspeed started, on all machines")
    add(
        "--autoencoder_path",
        type=cli.path,
        default="./autoencoder.pt",
        help="checkpoint that the samples were made with",
    )
    add("--num_interpretation_samples", type=COUNT, default=3, help="contexts an explanation is made from")
    add("--num_simulation_samples", type=COUNT, default=3, help="top contexts, and random ones, to score on")
    add("--local_rank", type=int, help="set by deepspeed")
    add(
        "--ssl_cert",
        type=cli.path,
        help="file with the certificate authority of the server (default: the system's)",
    )
    add("--insecure", action="store_true", help="do not verify the server's certificate")
    add("--index", help="ElasticSearch index (default: named after the autoencoder)")
    add("--server_patience", type=cli.number(least=0), default=600,
        help="seconds to keep trying a server that fails, once all features are explained")  # fmt: skip
    add("--parallel", choices=["tensor", "data"], default="tensor",
        help="tensor: the model split over all processes; data: a whole model in each")  # fmt: skip
    add("--simulation", choices=["contrastive", "expected"], default="contrastive",
        help="read against a neutral explanation, or the expected value alone")  # fmt: skip
    add("--num_explanations", type=COUNT, default=1, help="written per feature, the best is kept")
    add("--features", type=cli.whole_number(0), nargs="+", help="explain these features (default: all)")
    add("--max_features", type=cli.whole_number(0), default=0, help="explain the first N features (0: all)")
    add("--batch_size", type=cli.whole_number(2), default=8, help="features explained and scored together")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="of the LLM")
    add("--trust_remote_code", **cli.TRUST_REMOTE_CODE)
    add("--seed", type=cli.SEED, default=0, help="of selections and bootstrap intervals")
    return parser, parser.parse_args()


def settings(args, device):
    """What beside samples and LLM decides the documents, in words."""
    from sae import models

    flags = ("num_interpretation_samples", "num_simulation_samples", "num_explanations", "batch_size", "seed")
    dtype = str(models.pick_dtype(args.dtype, device)).removeprefix("torch.")
    return " ".join([*(f"{flag}={getattr(args, flag)}" for flag in flags), f"dtype={dtype}"])


def interpret(args):  # in each process
    from tqdm import tqdm

    from sae import explanations, models

    here = processes.join(args.num_gpus)
    path = Path(args.interpretation_samples_path).with_suffix(".explanations.jsonl")
    files = args.interpretation_samples_path, args.dataset_path, args.autoencoder_path, args.features or ()
    documents, name, trust = {}, args.interpretation_model_name, args.trust_remote_code
    with here.first_decides():
        if here.rank == 0:
            material = explanations.open_material(*files)
            skeleton = models.skeleton(name, args.dtype, trust)
            explanations.check_interpreter(skeleton, models.load_tokenizer(name, trust))
            origin = material.origin(name, args.simulation, settings(args, here.device))
            documents, torn = explanations.read_journal(path)
            explanations.check_journal(documents, origin, path)
            client = explanations.connect(args.server_address, args.api_key, args.ssl_cert, args.insecure)
            index = args.index or explanations.index_name(material.samples.config)
            explanations.ensure_index(client, index, origin)
            lacking = explanations.missing(client, index, documents.values())
            dropped = ", a torn last line dropped" if torn else ""
            print(
                f"{path}: {len(documents)} features done{dropped}; {index} lacks {len(lacking)}", flush=True
            )
    done = here.everyone(set(documents))[0]
    material = material if here.rank == 0 else explanations.open_material(*files)
    work = explanations.Plan(
        material, args.num_interpretation_samples, args.num_simulation_samples, args.num_explanations,
        args.batch_size, args.max_features,
    )  # fmt: skip
    pending = [number for number, group in enumerate(work.groups) if not done >= set(work.dims(group))]

    todo = sum(len(work.groups[number]) for number in pending)
    bar = tqdm(total=work.count, initial=work.count - todo, unit="feature", disable=here.rank > 0)

    with contextlib.ExitStack() as stack, bar:
        stopping = stack.enter_context(cli.stop_requested(forwarded=True))
        if here.rank == 0:
            writer = stack.enter_context(explanations.Writer(client, index, args.server_patience, stopping))
            book = stack.enter_context(explanations.Journal(path))
            writer.submit(lacking)
        interpreter = explanations.Interpreter(
            processes.load_model(here, name, args.dtype, args.parallel, trust),
            models.load_tokenizer(name, trust),
        ) if pending else None  # fmt: skip
        started = time.monotonic()
        rounds = explanations.explained(
            work, pending, here, args.parallel, interpreter,
            args.simulation, args.num_interpretation_samples, args.num_explanations, args.seed,
        )  # fmt: skip
        for results in rounds:
            bar.update(len(results))
            if here.rank == 0:
                new = {result["dim"]: origin | result for result in results if result["dim"] not in done}
                for document in new.values():
                    book.append(document)
                writer.submit(new.values())
                documents |= new
            if any(here.everyone(stopping())):
                if here.rank == 0:
                    print(f"stopped: {len(documents)} features are in {path}, the same command goes on")
                sys.exit(cli.STOPPED)  # an exit leaves the writer without waiting for a server that is down
        seconds = time.monotonic() - started
    if here.rank:
        return 0
    summary = explanations.summary(documents.values(), len(documents) - len(done), seconds)
    print(summary, f"wrote {path}; {writer.sent} documents sent to {index}", sep="\n")
    for dim, reason in writer.rejected:
        print(f"feature {dim}: rejected by the server: {reason}", file=sys.stderr)
    if writer.unsent:
        print(f"{writer.unsent} documents unsent ({writer.trouble}); the same command sends them",
              file=sys.stderr)  # fmt: skip
    return 3 if writer.unsent or writer.rejected else 0


def main():
    parser, args = parse_args()
    with parser.friendly_errors():
        sys.exit(interpret(args))


if __name__ == "__main__":
    main()
