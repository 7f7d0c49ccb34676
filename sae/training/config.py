"""Flags -> the config of a run: plain values, all that decides its results. Checkpoints keep it."""

from sae import InputError, __version__, models

# Flags that may differ when a run is resumed: they do not decide its results.
FREE_FLAGS = {
    "resume", "dry_run", "save_path", "dataset_path", "device_llm", "device_autoencoder", "trust_remote_code",
    "allow_other_tokenizer", "tensorboard", "num_gpus", "local_rank",
}  # fmt: skip


def held_out_contexts(flags, info):
    """Contexts to judge by. Not given: a twentieth of the tokens between two checkpoints, 128 to 4096."""
    context, size = flags["num_tokens"] or info["min_tokens"], flags["batch_size_autoencoder"]
    tokens = [flags[name] * size for name in ("num_batches", "batches_between_ckpt") if flags[name]]
    contexts = min(tokens, default=info["rows"] * context) // (20 * context)
    return flags["held_out_contexts"] or min(max(contexts, 128), 4096)


def run_config(flags, info, hookpoint, act_vec_size, dtype_llm, training_contexts):
    """The flags (a dict) with their defaults resolved, and what they name by its fingerprint.

    Raises InputError for flags that do not fit each other, the hookpoint's width or the dataset's contexts.
    """
    if flags["act_vec_size"] not in (None, act_vec_size):
        raise InputError(f"--act_vec_size {act_vec_size} needed by {hookpoint}, got {flags['act_vec_size']}")
    context, skipped = flags["num_tokens"] or info["min_tokens"], flags["skip_positions"]
    if context > info["min_tokens"] or skipped >= context:
        raise InputError(
            f"--num_tokens up to {info['min_tokens']} (the dataset's contexts) and --skip_positions below it "
            f"needed, got {flags['num_tokens']} and {skipped}"
        )
    tokens, batch_size = training_contexts * (context - skipped), flags["batch_size_autoencoder"]
    if tokens < batch_size:
        needed = f"--batch_size_autoencoder {batch_size} needs at least as many tokens to train on"
        raise InputError(f"{needed}, there are {tokens}")
    num_batches = flags["num_batches"] or tokens // batch_size
    dict_vec_size = flags["dict_vec_size"] or 4 * act_vec_size
    preload = flags["num_batches_preload"] and min(flags["num_batches_preload"], num_batches)
    given = {k: v for k, v in flags.items() if k not in FREE_FLAGS and not k.endswith("_hookpoint")}
    return given | {
        "num_batches": num_batches, "epoch_batches": tokens // batch_size, "num_batches_preload": preload,
        "training_contexts": training_contexts, "context_rows": context - skipped, "hookpoint": hookpoint,
        "act_vec_size": act_vec_size, "dict_vec_size": dict_vec_size,
        "dtype_llm": str(dtype_llm).removeprefix("torch."),
        "model_fingerprint": models.model_fingerprint(flags["model_name"]),
        "dataset_fingerprint": info["fingerprint"], "tokenizer_name": info["tokenizer_name"],
        "min_tokens": info["min_tokens"], "suite_version": __version__,
    } | of_architecture(flags, num_batches, dict_vec_size)  # fmt: skip


def of_architecture(flags, num_batches, dict_vec_size):
    """What the flags leave open and an architecture decides; InputError for flags of another architecture."""
    name, found = flags["architecture"], {"num_batches": num_batches}
    for flag, usual, readers in (("k", 32, ("topk", "batchtopk")), ("target_l0", 32.0, ("jumprelu",))):
        if name not in readers and flags[flag] is not None:
            raise InputError(f"--{flag} needs --architecture {' or '.join(readers)}, got {name}")
        found[flag] = flags[flag] or (min(usual, dict_vec_size) if name in readers else None)
        if (found[flag] or 0) > dict_vec_size:
            raise InputError(f"--{flag} of at most {dict_vec_size} (the features) needed, got {found[flag]}")
    if flags["scale_dataset"] and flags["normalize_dataset"]:
        raise InputError("one of --scale_dataset and --normalize_dataset needed, got both")
    defaults = {
        "lr_warmup_batches": 0 if name == "relu" else min(1000, num_batches // 20),
        "lr_decay_batches": 0 if name == "relu" else num_batches // 5,
        "scale_dataset": name != "relu" and not flags["normalize_dataset"],
    }
    found |= {flag: value if flags[flag] is None else flags[flag] for flag, value in defaults.items()}
    return found | {"auxk": "topk" in name and not flags["neuron_resampling_method"]}
