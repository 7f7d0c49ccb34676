"""Explain the features in interpretation samples with an LLM, score the explanations, index them.

    deepspeed --num_gpus 4 interpret_autoencoder_deepspeed.py localhost:9200 @key.txt --num_gpus 4

Every finished feature lies in <samples stem>.explanations.jsonl before it is sent: after a crash, or when
ElasticSearch was down, the same command goes on where the last one stopped.
"""

import contextlib
import sys
import time

from sae import cli, processes


def parse_args():
    parser = processes.Parser(__doc__)
    add, count = parser.add_argument, cli.whole_number(1)
    add("server_address", help="ElasticSearch: [http(s)://]host[:port]")
    add("api_key", help="its API key, or @FILE with the key (the launcher logs its command line: use @FILE)")
    # fmt: off
    add("--dataset_path", type=cli.path, default="./tokenized_dataset", help="tokenised dataset (folder)")
    add("--interpretation_samples_path", type=cli.path, default="./interpretation_samples.pt",
        help="samples to explain")
    add("--interpretation_model_name", type=cli.path, default="codellama/CodeLlama-34b-Instruct-hf",
        help="LLM that explains: hub name, folder or .gguf")
    add("--simulation_model_name", type=cli.path, help="LLM that simulates (default: the one that explains)")
    add("--num_gpus", type=count, default=4, help="processes that deepspeed started, on all machines")
    add("--autoencoder_path", type=cli.path, default="./autoencoder.pt",
        help="checkpoint that the samples were made with")
    add("--num_interpretation_samples", type=count, default=20, help="contexts an explanation is made from")
    add("--num_simulation_samples", type=count, default=10, help="top contexts, and random ones, to score on")
    add("--context_tokens", type=cli.whole_number(8), default=64, help="tokens of a context, around its peak")
    add("--local_rank", type=int, help="set by deepspeed")
    add("--ssl_cert", type=cli.path,
        help="file with the certificate authority of the server (default: the system's)")
    add("--insecure", action="store_true", help="do not verify the server's certificate")
    add("--index", help="ElasticSearch index (default: named after the autoencoder)")
    add("--server_patience", type=cli.number(least=0), default=600,
        help="seconds to keep trying a server that fails, once all features are explained")
    add("--parallel", choices=["tensor", "data"], default="tensor",
        help="tensor: the model split over all processes; data: a whole model in each")
    add("--simulation", choices=["contrastive", "tokens", "expected"], default="contrastive",
        help="read tokens, and lines where these see nothing; tokens alone; the expected value of lines")
    add("--num_explanations", type=count, default=3,
        help="per feature, best kept; 1: the LLM's from text; 2: also a count; 3: also the LLM's from lines")
    add("--scores", choices=["all", "simulation"], default="all", help="all: detection, fuzzing too")
    add("--features", type=cli.whole_number(0), nargs="+", help="explain these features (default: all)")
    add("--max_features", type=cli.whole_number(0), default=0, help="explain the first N features (0: all)")
    add("--batch_size", type=count, default=16, help="features that are explained together")
    add("--dtype", help="dtype of the LLMs", **cli.DTYPE)
    add("--trust_remote_code", **cli.TRUST_REMOTE_CODE)
    add("--dry_run", action="store_true", help="explain one batch, say what all would take, keep nothing")
    add("--seed", type=cli.SEED, default=0, help="seed of selections and bootstrap intervals")
    # fmt: on
    return parser, parser.parse_args()


def interpret(args):  # in each process
    from sae import explanations

    here = processes.join(args.num_gpus)
    with here.first_decides():
        work = explanations.prepare(here, **vars(args)) if here.rank == 0 else None
    done = here.from_first(set(work.documents) if work else None)
    work = work or explanations.prepare(here, **vars(args))
    pending = work.plan.pending(done)
    bar = explanations.Bar(work.plan, pending, shown=here.rank == 0)
    with contextlib.ExitStack() as stack, bar:
        stopping = stack.enter_context(cli.stop_requested(forwarded=True))
        if here.rank == 0 and not args.dry_run:
            patience = args.server_patience
            writer = stack.enter_context(explanations.Writer(work.client, work.index, patience, stopping))
            book = stack.enter_context(explanations.Journal(work.path))
            writer.submit(work.lacking)
        explainer = explanations.load(here, work.plan, bar, **vars(args)) if pending else None
        if args.dry_run:
            said = explanations.forecast(work.plan, explainer)
            print(said if here.rank == 0 else "", end="\n" if here.rank == 0 else "")
            return 0
        started = time.monotonic()
        for results in explanations.explained(
            work.plan, pending, here, args.parallel, explainer, stopping
        ):  # at the first process
            bar.reach(len(results))
            new = work.new(results)
            for document in new:  # in the journal before anything else happens with it
                book.append(document)
            writer.submit(new)
            work.documents.update((document["dim"], document) for document in new)
        seconds = time.monotonic() - started
        if any(here.everyone(stopping())):
            if here.rank == 0:
                count = len(work.documents)
                print(f"stopped: {count} features are in {work.path}, the same command goes on")
            sys.exit(cli.STOPPED)  # an exit leaves the writer without waiting for a server that is down
    if here.rank:
        return 0
    summary = explanations.summary(work.documents.values(), len(work.documents) - len(done), seconds)
    print(summary, f"wrote {work.path}; {writer.sent} documents sent to {work.index}", sep="\n")
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
