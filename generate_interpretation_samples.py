"""Choose, for every feature in a frequency band, the contexts that show what it does.

    python generate_interpretation_samples.py 100000 --autoencoder_path trained_autoencoders/100000.pt

One pass over num_samples contexts, drawn from the dataset, finds how often every feature fires and its best
contexts; a second look reads the activations in those alone. Hookpoint, normalisation, skipped positions and
tokens per context are those the checkpoint was trained with.
"""

import argparse
import sys
import time
from pathlib import Path

from sae import cli


def parse_args():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    positive, below_zero = cli.whole_number(1), cli.number(below=0)
    add("num_samples", type=positive, help="contexts to look at, drawn from the dataset")
    add(
        "--dataset_path",
        type=cli.path,
        default="./tokenized_dataset",
        help="folder the checkpoint was trained on",
    )
    add("--autoencoder_path", type=cli.path, default="./autoencoder.pt", help="checkpoint of the autoencoder")
    add("--save_path", type=cli.path, default="./interpretation_samples.pt", help="file to write")
    add(
        "--target_model_name",
        type=cli.path,
        help="LLM: hub name, folder or .gguf file; default: the checkpoint's",
    )
    add("--allow_other_tokenizer", action="store_true", help="than the LLM's for the dataset")
    add("--target_model_device", help="default: cuda:0, or cpu")
    add("--autoencoder_device", help="default: cuda:1, cuda:0 where that is the only GPU, or cpu")
    add("--log_freq_upper", type=below_zero, default=-0.1, help="keep features of a lower log10 frequency")
    add("--log_freq_lower", type=below_zero, default=-2.0, help="keep features of a higher log10 frequency")
    add("--num_top", type=positive, default=24, help="contexts per feature: those it fires on most")
    add("--num_spread", type=positive, default=12, help="contexts per feature: one per step of its range")
    add("--num_random", type=positive, default=16, help="contexts per feature: whatever it does there")
    add("--batch_size", type=positive, default=16, help="contexts in a forward pass of the LLM")
    add("--seed", type=cli.SEED, default=0, help="of the contexts looked at and of the draws among them")
    add("--dtype_llm", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the LLM")
    plot = argparse.BooleanOptionalAction
    add("--save_plot", action=plot, default=True, help="histogram of frequencies (.png) beside the samples")
    return parser, parser.parse_args()


def main(args, stopping):
    import torch
    from tqdm import tqdm

    from sae import samples
    from sae.plots import frequency_histogram

    started = time.monotonic()
    run = samples.prepare(**vars(args))
    rng, band = torch.Generator().manual_seed(args.seed), (args.log_freq_lower, args.log_freq_upper)
    rows_N, documents_N = run.rows(args.num_samples, rng)
    survey = samples.Survey(
        run.checkpoint.autoencoder, documents_N, args.num_top, args.num_spread, args.num_random, rng
    )

    def look(contexts, what):
        # In a log file a bar is a nuisance, until the run is long enough to be wondered about.
        delay = 0 if sys.stderr.isatty() else 10
        with tqdm(total=len(contexts), desc=what, unit="context", delay=delay) as bar:
            for batch, pieces in run.look(rows_N, contexts):
                yield from pieces
                if bar.update(len(batch)):
                    inside = samples.between(survey.log10_frequency(), *band).sum()
                    bar.set_postfix_str(f"{inside} features in the band", refresh=False)
                if stopping():
                    raise KeyboardInterrupt(f"{bar.n} of {bar.total} contexts done ({what})")

    begun = time.monotonic()
    for contexts_b, f_bTF in look(torch.arange(len(rows_N)), "one pass"):
        survey.add(contexts_b, f_bTF)
    rate, frequency = args.num_samples / (time.monotonic() - begun), survey.log10_frequency()
    features = samples.in_band(frequency, *band)
    contexts_FK, kind_FK, max_F = survey.choose(features)
    kept = contexts_FK[contexts_FK >= 0].unique()
    pieces = look(kept, "second look")
    values_FKT = samples.read_activations(pieces, contexts_FK, features, run.context_tokens)
    rows_FK = rows_N[contexts_FK].where(contexts_FK >= 0, -1)
    samples.save_samples(
        args.save_path,
        samples.Samples(
            run.config(**vars(args)), run.info["fingerprint"], run.checkpoint.fingerprint, survey.tokens,
            frequency, features, max_F, rows_FK, values_FKT, kind_FK,
        ),
    )  # fmt: skip
    if args.save_plot:
        title = f"{args.num_samples} contexts, {survey.tokens} tokens"
        frequency_histogram(Path(args.save_path).with_suffix(".png"), frequency, title, band)
    dead = frequency.isneginf().sum()
    print(
        f"{len(features)} features in the band, {(frequency <= band[0]).sum() - dead} too rare, "
        f"{(frequency >= band[1]).sum()} too frequent, {dead} dead; written to {args.save_path}, "
        f"{len(kept)} contexts looked at twice; {time.monotonic() - started:.1f} s, {rate:.1f} contexts/s"
    )
    return 0


if __name__ == "__main__":
    PARSER, ARGS = parse_args()
    with PARSER.friendly_errors(), cli.stop_requested() as STOPPING:
        try:
            sys.exit(main(ARGS, STOPPING))
        except KeyboardInterrupt as stop:
            PARSER.exit(130, f"stopped, {stop}; nothing was written, the same command starts again\n")
