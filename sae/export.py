"""Open an autoencoder in other tools.

    python -m sae.export runs/layer10/50000.pt exported --format sae_lens
    python -m sae.export runs/layer10/50000.pt shown --format neuronpedia --samples samples.pt
    hf upload me/smollm2-layer10-sae exported

Writes a folder that was not there before: `sae_lens` is what `sae_lens.SAE.load_from_disk` opens (cfg.json,
sae_weights.safetensors, sparsity.safetensors), `safetensors` the weights and the config as they are, both
with a model card (README.md); `neuronpedia` the features of a samples file, for Neuronpedia.
"""

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from sae import InputError, __version__, cli

FORMATS = ("sae_lens", "safetensors", "neuronpedia")
# The layout of cfg.json, as of this version of the package; without it SAELens reads its older layout.
SAE_LENS_VERSION = "6.54.12"


# At inference batchtopk has a threshold, which SAELens calls jumprelu.
SAE_LENS_NAMES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}


def sae_lens_config(config):
    """cfg.json: the same sums, in SAELens' words, and where to hook the model."""
    last, architecture = config.get("num_tokens") or None, config.get("architecture", "relu")
    topk = {"k": config["k"], "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    return {
        "architecture": SAE_LENS_NAMES[architecture],
        **topk,
        "d_in": config["act_vec_size"],
        "d_sae": config["dict_vec_size"],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "constant_norm_rescale" if config.get("normalize_dataset") else "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAE_LENS_VERSION,
            # Hooks are named after the modules of the Hugging Face model only with this class.
            "model_class_name": "AutoModelForCausalLM",
            "model_name": config["model_name"],
            "model_from_pretrained_kwargs": {},
            "hook_name": config["hookpoint"],
            "hook_head_index": None,
            "context_size": config.get("min_tokens"),
            "seqpos_slice": [config.get("skip_positions", 0), last],
            "prepend_bos": False,
            "trained_with": f"sae-suite {__version__}",
            "training": {key: config.get(key) for key in sorted(config)},
        },
    }


def model_card(config, metrics, format):
    """README.md of the folder: where the autoencoder belongs, how to open it, how good it is."""
    from huggingface_hub import ModelCard, ModelCardData

    name = config["model_name"]
    is_local = Path(name).exists() or name.startswith((".", "/", "~"))
    data = ModelCardData(
        library_name="sae_lens" if format == "sae_lens" else None,
        base_model=None if is_local else name,
        tags=["sparse-autoencoder", "interpretability"],
    )
    return ModelCard.from_template(
        data, template_path=Path(__file__).with_name("card.md.jinja"), config=config, metrics=metrics,
        model=Path(name).name if is_local else name, format=format, version=__version__,
    )  # fmt: skip


@contextmanager
def new_folder(out):
    """A folder to fill that appears at `out` whole or not at all. InputError where something is there."""
    from sae.artifacts import check_folder, sync

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"a new or empty folder needed at {out}, it holds something")
    check_folder("out", out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".partial") as partial:
        folder = Path(partial, "whole")  # with the rights that new folders have
        folder.mkdir()
        yield folder
        for path in (folder, *folder.rglob("*")):
            sync(path)
        os.replace(folder, out)
    sync(out.parent)


def export(checkpoint_path, out, format, model_name=None):
    """Write the folder `out`; returns its card."""
    import torch
    from safetensors.torch import save_file

    from sae.artifacts import read_metrics
    from sae.autoencoder import load_checkpoint

    checkpoint = load_checkpoint(checkpoint_path)
    config = checkpoint.config | ({"model_name": model_name} if model_name else {})
    weights = {name: value.contiguous() for name, value in checkpoint.autoencoder.state_dict().items()}
    metrics = read_metrics(Path(checkpoint_path).parent / "metrics.jsonl", config.get("trained_batches"))
    card = model_card(config, metrics, format)
    with new_folder(out) as folder:
        if format == "sae_lens":
            save_file(weights, folder / "sae_weights.safetensors")
            # SAELens keeps log10(share + 1e-10), so that a dead feature is -10.
            sparsity_F = torch.log10(10 ** checkpoint.log10_frequency.double() + 1e-10).float()
            save_file({"sparsity": sparsity_F}, folder / "sparsity.safetensors")
            written, name = sae_lens_config(config), "cfg.json"
        else:
            frequency = {"log10_frequency": checkpoint.log10_frequency.contiguous()}
            save_file(weights | frequency, folder / "autoencoder.safetensors")
            written, name = config, "config.json"
        (folder / name).write_text(json.dumps(written, indent=2) + "\n")
        card.save(folder / "README.md")
    return card


def parse_args():
    parser = cli.Parser(__doc__)
    parser.prog = "python -m sae.export"
    parser.add_argument("checkpoint", type=cli.path, help="autoencoder checkpoint (.pt)")
    parser.add_argument("out", type=cli.path, help="folder to write: new or empty")
    parser.add_argument("--format", choices=FORMATS, default="sae_lens", help="layout of the folder")
    parser.add_argument("--model_name", help="hub name to write for a model that was a local folder")
    for_page = parser.add_argument_group("for --format neuronpedia")
    for_page.add_argument("--samples", type=cli.path, help="interpretation samples of the checkpoint (.pt)")
    default, journal = "./tokenized_dataset", "journal; default: <samples stem>.explanations.jsonl, if there"
    for_page.add_argument("--dataset_path", type=cli.path, default=default, help="their dataset")
    for_page.add_argument("--explanations", type=cli.path, help=journal)
    return parser, parser.parse_args()


def main(args):
    if args.format == "neuronpedia":
        from sae.report import open_run, write_neuronpedia

        if not args.samples:
            raise InputError("--samples needed for --format neuronpedia, none was given")
        with new_folder(args.out) as folder:
            run = open_run(args.samples, args.dataset_path, args.explanations, args.checkpoint, None)
            write_neuronpedia(folder, run, args.model_name or Path(run.samples.config["model_name"]).name)
    elif args.samples or args.explanations:
        raise InputError(f"--samples and --explanations need --format neuronpedia, {args.format} came")
    else:
        export(args.checkpoint, args.out, args.format, args.model_name)
    size = sum(file.stat().st_size for file in Path(args.out).rglob("*"))
    print(f"{args.out}: {args.checkpoint} as {args.format}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    PARSER, ARGS = parse_args()
    with PARSER.friendly_errors():
        main(ARGS)
