"""Train a sparse autoencoder on the activations of one layer of an LLM.

    python train_autoencoder_from_tokens.py 19 mlp_activations --num_batches 100000 --save_path runs/layer19

Writes <save_path>/<trained_batches>.pt, images/, metrics.jsonl and resume.pt; stopped or killed, the same
command with --resume goes on to the same weights. On several GPUs, each with a share of the features:

    deepspeed --num_gpus 4 train_autoencoder_from_tokens.py 19 mlp_activations ... --num_gpus 4
"""

import contextlib
import sys
import time
from argparse import BooleanOptionalAction as YES_NO

from sae import cli, processes

ARCHITECTURES, REVIVALS = ("relu", "topk", "batchtopk", "jumprelu"), ("replacement", "anthropic")
FIRE = "features that fire on a token; default: 32, or all features where they are fewer"
HOOKPOINTS = {
    "attn_sublayer": "model.layers.{}.self_attn",
    "mlp_sublayer": "model.layers.{}.mlp",
    "mlp_activations": "model.layers.{}.mlp.act_fn",
    "residual": "model.layers.{}",
}


def parse_args():
    parser = processes.Parser(__doc__)
    add, count, positive = parser.add_argument, cli.whole_number(0), cli.whole_number(1)
    folder = {"type": cli.path, "metavar": "FOLDER"}
    add("layer_id", type=count, help="layer of the LLM, counted from 0")
    add("layer_type", choices=HOOKPOINTS, help="what of the layer to train on")
    add("--num_batches", type=count, default=0, help="training steps; 0: one pass over the dataset")
    add("--dataset_path", default="./tokenized_dataset", help="tokenised dataset", **folder)
    add("--save_path", default="./trained_autoencoders", help="for checkpoints, metrics and plots", **folder)
    add("--model_name", type=cli.path, default=cli.CODELLAMA, help="LLM: hub name, folder or .gguf file")
    add("--allow_other_tokenizer", action="store_true", help="accept a dataset of another tokenizer")
    add("--batch_size_llm", type=positive, default=16, help="contexts in a forward pass of the LLM")
    add("--batch_size_autoencoder", type=positive, default=256, help="tokens in a training step")
    add("--num_tokens", type=count, default=0, help="use the first N tokens of every context; 0: all")
    add("--device_llm", help="default: cuda:0, or cpu")
    add("--device_autoencoder", help="default: cuda:1, cuda:0 where that is the only GPU, or cpu")
    rate, weight = cli.number(above=0), cli.number(least=0)
    add("--learning_rate", type=rate, nargs="+", default=1e-4, help="Adam's; several values: a sweep")
    add("--architecture", choices=ARCHITECTURES, default="relu", help="what keeps the features that fire few")
    add("--l1_coefficient", type=weight, nargs="+", default=1.0, help="weight of the penalty: relu, jumprelu")
    add("--k", type=positive, nargs="+", help=f"topk, batchtopk: {FIRE}")
    add("--target_l0", type=rate, nargs="+", help=f"jumprelu: {FIRE}")
    add("--lr_warmup_batches", type=count, help="learning rate up from 0; default: 5%%, 0 for relu")
    add("--lr_decay_batches", type=count, help="and down to 0 at the end; default: 20%%, 0 for relu")
    add("--l1_warmup_batches", type=count, default=0, help="l1_coefficient up from 0")
    add("--act_vec_size", type=positive, help="width of the hookpoint; default: read off it")
    add("--dict_vec_size", type=positive, nargs="+", help="features; default: 4 x act_vec_size")
    add("--batches_between_ckpt", type=count, default=12500, help="training steps; 0: only a last checkpoint")
    add("--num_batches_preload", type=positive, help="in the shuffle buffer; default: 25000 or what fits")
    add("--neuron_resampling_method", choices=REVIVALS, help="for dead features; default: off")
    add("--neuron_resampling_interval", type=positive, default=25000, help="training steps between revivals")
    add("--normalize_dataset", action="store_true", help="scale activations to L2 norm sqrt(act_vec_size)")
    add("--scale_dataset", action=YES_NO, help="all activations by one factor; default: yes, relu: no")
    for layer_type, module in HOOKPOINTS.items():
        add(f"--{layer_type}_hookpoint", default=module, metavar="MODULE", help="its module; {} is the layer")
    add("--resume", action="store_true", help="go on with the run in save_path; needs the same flags")
    add("--tensorboard", action="store_true", help="write the metrics for TensorBoard as well")
    add("--seed", type=cli.SEED, default=0, help="seed of the data's order, first weights and revivals")
    add("--dtype_llm", help="dtype of the LLM", **cli.DTYPE)
    add("--skip_positions", type=count, default=0, help="leave out the first N tokens of every context")
    add("--held_out_contexts", type=count, default=0, help="to judge by; 0: 128 to 4096, by the run's length")
    add("--trust_remote_code", **cli.TRUST_REMOTE_CODE)
    add("--dry_run", action="store_true", help="print memory, batches and the expected time, and stop")
    add("--num_gpus", type=positive, default=1, help="processes that deepspeed started, on all machines")
    add("--local_rank", type=int, help="set by deepspeed")
    return parser, parser.parse_args(cli.layer_first(sys.argv[1:], HOOKPOINTS))


def main(args, stopping):
    from sae import training

    # Prepare: whatever can be refused is refused, and memory planned, before weights are read.
    here = processes.alone_or_join(args.num_gpus)
    say = print if here.rank == 0 else lambda *_words, **_how: None
    run = training.prepare(vars(args), here)
    num_batches = run.config["num_batches"]
    if run.finished:
        say(f"nothing to do: the run in {run.path} is complete, {num_batches} batches")
        return 0
    say(run.plan, flush=True)

    # Stream: contexts -> rows of activations -> shuffled batches.
    model, module = run.open_llm()
    trainers = run.trainers()
    if args.dry_run:
        return say(training.timed_steps(run, model, module, trainers))
    before = min(trainer.batch for trainer in trainers)
    buffer = training.stream(run, model, module, before, lambda: here.sum(stopping()))

    # Loop.
    started = time.monotonic()
    with run.bar(before) as bar, contextlib.suppress(KeyboardInterrupt):
        for shown in training.loop(run, model, module, trainers, buffer):
            bar.set_description("training", refresh=False)
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if here.sum(stopping()):
                break
    if (done := min(trainer.batch for trainer in trainers)) < num_batches:
        run.save_resume(trainers)
        run.wait()
        say(f"\nstopped after batch {done}; the same command with --resume goes on", flush=True)
        here.everyone(None)  # the launcher ends the first process once another one has left
        return cli.STOPPED
    say(run.wrote(num_batches - before, time.monotonic() - started))
    return 0


if __name__ == "__main__":
    PARSER, ARGS = parse_args()
    with PARSER.friendly_errors(), cli.stop_requested(forwarded=processes.launched()) as STOPPING:
        PARSER.exit(main(ARGS, STOPPING))
