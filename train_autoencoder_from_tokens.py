"""Train a sparse autoencoder on the activations of one layer of an LLM.

    python train_autoencoder_from_tokens.py 19 mlp_activations --num_batches 100000 --save_path runs/layer19

Writes <save_path>/<trained_batches>.pt, images/, metrics.jsonl and resume.pt; stopped or killed, the same
command with --resume goes on to the same weights.
"""

import functools
import itertools
import sys
import time

from sae import cli

LAYER_TYPES = ("attn_sublayer", "mlp_sublayer", "mlp_activations")


def parse_args():
    parser = cli.Parser(__doc__)
    add, count, positive = parser.add_argument, cli.whole_number(0), cli.whole_number(1)
    hookpoint = {"metavar": "MODULE", "help": "module for this layer_type; {} is the layer"}
    add("layer_id", type=count, help="layer of the LLM, counted from 0")
    add("layer_type", choices=LAYER_TYPES, help="what of the layer to train on")
    add("--num_batches", type=count, default=0, help="training steps; 0: one pass over the dataset")
    add("--dataset_path", type=cli.path, default="./tokenized_dataset", help="tokenised dataset (folder)")
    add(
        "--save_path",
        type=cli.path,
        default="./trained_autoencoders",
        help="folder for checkpoints, metrics and plots",
    )
    add("--model_name", type=cli.path, default=cli.CODELLAMA, help="LLM: hub name, folder or .gguf file")
    add("--batch_size_llm", type=positive, default=16, help="contexts in a forward pass of the LLM")
    add("--batch_size_autoencoder", type=positive, default=256, help="tokens in a training step")
    add("--num_tokens", type=count, default=0, help="use the first N tokens of every context; 0: all")
    add("--device_llm", help="default: cuda:0, or cpu")
    add("--device_autoencoder", help="default: cuda:1, cuda:0 where that is the only GPU, or cpu")
    add("--learning_rate", type=cli.number(above=0), default=1e-4, help="of Adam")
    add("--l1_coefficient", type=cli.number(least=0), default=1.0, help="weight of the sum of activations")
    add("--act_vec_size", type=positive, help="width of the hookpoint; default: read off it")
    add("--dict_vec_size", type=positive, help="features in the dictionary; default: 4 x act_vec_size")
    add("--batches_between_ckpt", type=count, default=12500, help="training steps; 0: only a last checkpoint")
    add("--num_batches_preload", type=positive, help="in the shuffle buffer; default: 25000 or what fits")
    methods = ("replacement", "anthropic")
    add("--neuron_resampling_method", choices=methods, help="for dead features; default: off")
    add("--neuron_resampling_interval", type=positive, default=25000, help="training steps between revivals")
    add("--normalize_dataset", action="store_true", help="scale activations to L2 norm sqrt(act_vec_size)")
    add("--mlp_activations_hookpoint", default="model.layers.{}.mlp.act_fn", **hookpoint)
    add("--mlp_sublayer_hookpoint", default="model.layers.{}.mlp", **hookpoint)
    add("--attn_sublayer_hookpoint", default="model.layers.{}.self_attn", **hookpoint)
    add("--resume", action="store_true", help="go on with the run in save_path; needs the same flags")
    add("--seed", type=cli.SEED, default=0, help="of the data's order, the first weights and the revivals")
    add("--dtype_llm", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the LLM")
    add("--skip_positions", type=count, default=0, help="leave out the first N tokens of every context")
    add("--dry_run", action="store_true", help="print memory, batches and the expected time, and stop")
    return parser, parser.parse_args()


def main(args, stopping):
    from tqdm import tqdm

    from sae import activations, models, tokens, training

    device_llm, device = cli.device_pair(args.device_llm, args.device_autoencoder)
    dtype_llm, dtype = models.pick_dtype(args.dtype_llm, device_llm), models.fast_dtype(device)
    dataset, info = tokens.open_dataset(args.dataset_path)
    skeleton = models.skeleton(args.model_name)
    models.check_vocabulary(skeleton.config, info)
    template = getattr(args, f"{args.layer_type}_hookpoint")
    hooked = activations.find_hookpoint(skeleton, template, args.layer_id)
    training_rows, held_out_rows = training.split_held_out(dataset.with_format("numpy")["document"][:])
    width = activations.activation_width(skeleton, hooked[0])
    config = training.run_config(vars(args), info, hooked[1], width, dtype_llm, len(training_rows))
    saved = None if args.dry_run else training.saved_run(args.save_path, config, args.resume)
    if saved:
        config["num_batches_preload"] = saved["config"]["num_batches_preload"]
        if saved["trainer"]["batch"] == config["num_batches"]:
            print(f"nothing to do: the run in {args.save_path} is complete, {config['num_batches']} batches")
            return 0
    config, line = training.plan_memory(config, skeleton, (device_llm, dtype_llm), (device, dtype))
    print(line, flush=True)

    model = models.load_model(args.model_name, device_llm, dtype_llm)
    module, _ = activations.find_hookpoint(model, template, args.layer_id)
    trainer = training.new_trainer(config, device, dtype)
    if saved:
        trainer.restore(saved["trainer"])

    # Contexts, in a new order each epoch -> rows of activations -> shuffled batches.
    first, skip, last = training.stream_start(config, trainer.batch)
    order = training.llm_batches(len(training_rows), args.batch_size_llm, args.seed, first)
    order = itertools.islice(order, 3 if args.dry_run else last - first)
    read = functools.partial(tokens.read_contexts, batch_size=args.batch_size_llm, num_tokens=args.num_tokens)
    contexts = itertools.chain.from_iterable(read(dataset, training_rows[places]) for places in order)
    rows = activations.activation_rows(model, module, contexts, args.skip_positions)
    rows = iter(tqdm(rows, total=last - first, desc="LLM", unit="forward", position=1, leave=False))
    rows, two = (rows_ND.to(device) for rows_ND in rows), device != device_llm
    if args.dry_run:
        print(training.timed_steps(trainer, rows, config, overlap=two))
        return 0
    rows = cli.until(stopping, activations.prefetch(rows) if two else rows)
    num_batches, batch_size = config["num_batches"], args.batch_size_autoencoder
    preload = config["num_batches_preload"]
    buffer = training.ShuffleBuffer(rows, batch_size, num_batches, preload, args.seed, device, skip)
    plan = training.Resampling.of(args.neuron_resampling_method, args.neuron_resampling_interval)
    folder = training.RunFolder(args.save_path, config, saved)
    if not saved:
        folder.save_resume(trainer)

    started, before, shown = time.monotonic(), trainer.batch, {}
    bar = tqdm(total=num_batches, initial=before, unit="batch", desc="filling the buffer")
    try:
        for events in training.train(trainer, buffer, num_batches, plan, args.seed):
            folder.append(events)
            last = trainer.batch == num_batches
            if last or (args.batches_between_ckpt and trainer.batch % args.batches_between_ckpt == 0):
                judged = trainer.autoencoder, read(dataset, held_out_rows), args.skip_positions
                figures = training.evaluate(model, module, *judged)
                events = [*events, folder.save_checkpoint(trainer, figures)]
            elif folder.resume_is_old():
                folder.save_resume(trainer)
            shown |= training.bar_figures(events)
            bar.set_description("training", refresh=False)
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if stopping() and not last:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        folder.save_resume(trainer)
        print(f"\nstopped after batch {trainer.batch}; the same command with --resume goes on")
        return cli.STOPPED
    finally:
        bar.close()
    seconds = time.monotonic() - started
    rate = (trainer.batch - before) * batch_size / max(seconds, 1e-9)
    wrote = f"wrote {folder.path / str(num_batches)}.pt, images/ and metrics.jsonl"
    print(f"{wrote}: {training.held_out(events[-1])}; {seconds:.0f} s, {rate:.0f} tokens/s")
    return 0


if __name__ == "__main__":
    PARSER, ARGS = parse_args()
    with PARSER.friendly_errors(), cli.stop_requested() as STOPPING:
        sys.exit(main(ARGS, STOPPING))
