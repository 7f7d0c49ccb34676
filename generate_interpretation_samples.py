"""Choose, for every feature in a frequency band, the contexts that show what it does.

    python generate_interpretation_samples.py 100000 --autoencoder_path trained_autoencoders/100000.pt

One pass over num_samples contexts, drawn from the dataset, finds how often every feature fires and its best
contexts; a second look reads the activations in those alone. Hookpoint, normalisation, skipped positions and
tokens per context are those the checkpoint was trained with. On several GPUs, with the same result:

    deepspeed --num_gpus 4 generate_interpretation_samples.py 100000 ... --num_gpus 4
"""

import argparse
import os
import sys
import time
from pathlib import Path

from sae import cli, processes


def parse_args():
    parser = processes.Parser(__doc__)
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
    add("--allow_other_tokenizer", action="store_true", help="accept a dataset of another tokenizer")
    add("--target_model_device", help="default: cuda:0, or cpu")
    add("--autoencoder_device", help="default: cuda:1, cuda:0 where that is the only GPU, or cpu")
    add("--log_freq_upper", type=below_zero, default=-0.1, help="keep features of a lower log10 frequency")
    add("--log_freq_lower", type=below_zero, default=-2.0, help="keep features of a higher log10 frequency")
    add("--num_top", type=positive, default=24, help="contexts per feature: those it fires on most")
    add("--num_spread", type=positive, default=12, help="contexts per feature: one per step of its range")
    add("--num_random", type=positive, default=16, help="contexts per feature: whatever it does there")
    add("--batch_size", type=positive, default=16, help="contexts in a forward pass of the LLM")
    add("--seed", type=cli.SEED, default=0, help="seed of the contexts looked at and the draws among them")
    add("--dtype_llm", help="dtype of the LLM", **cli.DTYPE)
    add("--num_gpus", type=positive, default=1, help="processes that deepspeed started, on all machines")
    add("--local_rank", type=int, help="set by deepspeed")
    add("--trust_remote_code", **cli.TRUST_REMOTE_CODE)
    plot = argparse.BooleanOptionalAction
    add("--save_plot", action=plot, default=True, help="histogram of frequencies (.png) beside the samples")
    return parser, parser.parse_args()


def main(args, stopping):
    import torch

    from sae import samples
    from sae.plots import draw, frequency_histogram

    started = time.monotonic()
    here = processes.alone_or_join(args.num_gpus)
    run = samples.prepare(here, **vars(args))
    rng, band = torch.Generator().manual_seed(args.seed), (args.log_freq_lower, args.log_freq_upper)
    rows_N, documents_N = run.rows(args.num_samples, rng)
    autoencoder = run.checkpoint.autoencoder
    survey = samples.Survey(autoencoder, documents_N, args.num_top, args.num_spread, args.num_random, rng)

    def look(contexts, what):
        def note():
            return f"{samples.between(survey.log10_frequency(), *band).sum()} features in the band"

        return run.look(rows_N, contexts, what, here, stopping, note)

    begun = time.monotonic()
    for contexts_b, f_bTF in look(torch.arange(len(rows_N)), "one pass"):
        survey.add(contexts_b, f_bTF)
    rate, choice = args.num_samples / (time.monotonic() - begun), None
    for state in here.everyone(survey.state())[1:]:
        survey.merge(*state)
    frequency = survey.log10_frequency()
    with here.first_decides():
        if here.rank == 0:
            choice = survey.choose(samples.in_band(frequency, *band), autoencoder.W_dec)
    choice = here.from_first(choice)
    kept = choice.contexts_FK[choice.contexts_FK >= 0].unique()
    values_FKT, peak_FM = samples.read_activations(look(kept, "second look"), choice, run.context_tokens)
    here.total(values_FKT)
    here.total(peak_FM)
    if here.rank:
        return 0
    content = run.samples(survey, choice, values_FKT, peak_FM, rows_N, **vars(args))
    samples.save_samples(args.save_path, content)
    if args.save_plot:
        title = f"{args.num_samples} contexts, {survey.tokens} tokens"
        draw(frequency_histogram, Path(args.save_path).with_suffix(".png"), frequency, title, band)
    dead = frequency.isneginf().sum()
    print(
        f"{len(choice.features_F)} features in the band, {(frequency <= band[0]).sum() - dead} too rare, "
        f"{(frequency >= band[1]).sum()} too frequent, {dead} dead; written to {args.save_path}, "
        f"{len(kept)} contexts looked at twice; {time.monotonic() - started:.1f} s, {rate:.1f} contexts/s"
    )
    if hint := samples.wider_band(frequency, *band):
        print(f"few features in the band: {hint}")
    return 0


if __name__ == "__main__":
    PARSER, ARGS = parse_args()
    with PARSER.friendly_errors(), cli.stop_requested(forwarded=processes.launched()) as STOPPING:
        try:
            sys.exit(main(ARGS, STOPPING))
        except KeyboardInterrupt as stop:
            line = f"stopped, {stop}; nothing was written, the same command starts again\n"
            PARSER.exit(cli.STOPPED, line if int(os.environ.get("RANK", 0)) == 0 else "")
