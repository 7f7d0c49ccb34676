import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sae import InputError
from sae.activations import (
    activation_rows,
    activation_width,
    activations_at,
    carried,
    find_hookpoint,
    on_output,
    prefetch,
)
from sae.models import load_model, skeleton

TEMPLATES = {
    "mlp_activations": "model.layers.{}.mlp.act_fn",
    "mlp_sublayer": "model.layers.{}.mlp",
    "attn_sublayer": "model.layers.{}.self_attn",
}


@pytest.mark.parametrize("layer_type", TEMPLATES)
def test_activations_are_the_modules_output_on_the_real_model(smollm2, stdlib_contexts, layer_type):
    """The independent check: plain transformers, a plain hook, the whole forward pass."""
    from transformers import AutoModelForCausalLM

    ids_BT = torch.tensor(stdlib_contexts[0][:3])
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    seen = {}
    layer = plain.model.layers[10]
    hooked = {
        "mlp_activations": layer.mlp.act_fn,
        "mlp_sublayer": layer.mlp,
        "attn_sublayer": layer.self_attn,
    }
    hooked[layer_type].register_forward_hook(lambda _mod, _in, out: seen.update(out=out))
    with torch.no_grad():
        plain(ids_BT)
    want_BTD = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]

    model = load_model(smollm2, "cpu", "float32")
    module, _ = find_hookpoint(model, TEMPLATES[layer_type], 10)
    assert torch.equal(activations_at(model, module, ids_BT), want_BTD)
    assert activation_width(model, module) == want_BTD.shape[-1]


def test_the_pass_stops_at_the_hookpoint(tiny_llama):
    model = load_model(tiny_llama, "cpu", "float32")
    module, _ = find_hookpoint(model, TEMPLATES["mlp_sublayer"], 1)
    ran = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _mod, _in, number=number: ran.append(number))
    activations_at(model, module, torch.zeros(1, 4, dtype=torch.long))
    assert ran == [0, 1]
    assert not module._forward_hooks  # hooks always leave
    with pytest.raises(InputError, match="the model never runs this module"):
        activations_at(model, torch.nn.Identity(), torch.zeros(1, 4, dtype=torch.long))


def test_width_is_read_off_a_model_without_weights(tiny_llama):
    bones = skeleton(tiny_llama)
    widths = [activation_width(bones, find_hookpoint(bones, name, 2)[0]) for name in TEMPLATES.values()]
    assert widths == [48, 32, 32]
    bones.model.layers[0].register_forward_pre_hook(lambda _mod, given: given[0].sum().item())
    with pytest.raises(InputError, match="runs without weights needed, to know the width"):
        activation_width(bones, find_hookpoint(bones, TEMPLATES["mlp_sublayer"], 2)[0])


@pytest.mark.parametrize(
    ("config", "template", "width"),
    [
        ("GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)", "transformer.h.{}.mlp.act", 64),
        ("GPTNeoXConfig(hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, "
         "vocab_size=50)", "gpt_neox.layers.{}.attention", 16),
        ("Qwen2Config(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, "
         "num_key_value_heads=1, vocab_size=50)", "model.layers.{}.mlp.act_fn", 24),
    ],
)  # fmt: skip
def test_any_causal_lm_works(config, template, width):
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(eval("transformers." + config)).eval()
    module, name = find_hookpoint(model, template, 1)
    assert activations_at(model, module, torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, width)
    with torch.device("meta"):
        bones = transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    assert activation_width(bones, dict(bones.named_modules())[name]) == width


def test_layers_and_hookpoints_that_are_not_there(tiny_llama):
    bones = skeleton(tiny_llama)
    for layer in (-1, 3):
        with pytest.raises(InputError, match=f"0 to 2.*got {layer}"):
            find_hookpoint(bones, "model.layers.{}.mlp", layer)
    for template in ("layers.{}.{}", "{x}", "{"):
        with pytest.raises(InputError, match=r"one \{\} for the layer"):
            find_hookpoint(bones, template, 1)
    with pytest.raises(InputError, match=r"closest: model\.layers\.1\.mlp"):
        find_hookpoint(bones, "model.layers.{}.mpl", 1)


def test_layers_of_a_model_that_sees_pictures_too_are_those_of_its_text_model(tiny_llama):
    from transformers import LlavaConfig

    bones = skeleton(tiny_llama)
    bones.config = LlavaConfig(text_config=bones.config)
    assert find_hookpoint(bones, "model.layers.{}.mlp", 2)[1] == "model.layers.2.mlp"


def test_on_output_replaces_the_first_of_a_tuple(tiny_llama):
    model = load_model(tiny_llama, "cpu", "float32")
    ids_BT = torch.arange(8)[None]
    plain = model(ids_BT).logits
    for name in ("mlp_sublayer", "attn_sublayer"):
        module, _ = find_hookpoint(model, TEMPLATES[name], 1)
        with on_output(module, ids_BT.shape, lambda first: None):
            assert torch.equal(model(ids_BT).logits, plain)
        with on_output(module, ids_BT.shape, torch.zeros_like):
            assert not torch.allclose(model(ids_BT).logits, plain)
        assert torch.equal(model(ids_BT).logits, plain)


def test_a_module_that_sees_contexts_and_tokens_flattened(tmp_path):
    """OPT's activation function does: [B * T, D]."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_attention_heads": 2}
    OPTForCausalLM(OPTConfig(vocab_size=50, num_hidden_layers=2, **sizes)).save_pretrained(tmp_path)
    model, ids_BT = load_model(str(tmp_path), "cpu", "float32"), torch.arange(12).view(2, 6)
    module, _ = find_hookpoint(model, "model.decoder.layers.{}.activation_fn", 1)
    acts_BTD = activations_at(model, module, ids_BT)
    assert acts_BTD.shape == (2, 6, 24)
    bones = skeleton(str(tmp_path))
    assert activation_width(bones, bones.model.decoder.layers[1].activation_fn) == 24
    plain = model(ids_BT).logits
    with on_output(module, ids_BT.shape, lambda first: first + (first != acts_BTD)):
        assert torch.equal(model(ids_BT).logits, plain)
    with on_output(module, ids_BT.shape, torch.zeros_like):
        assert not torch.allclose(model(ids_BT).logits, plain)


def test_passes_of_other_threads_are_left_alone(tiny_llama):
    """The buffer is filled in one thread while a checkpoint is judged in another."""
    model = load_model(tiny_llama, "cpu", "float32")
    module, _ = find_hookpoint(model, TEMPLATES["mlp_sublayer"], 1)
    ids_BT = torch.arange(8)[None]
    plain, acts_BTD = model(ids_BT).logits, activations_at(model, module, ids_BT)
    with on_output(module, ids_BT.shape, torch.zeros_like), ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(model, ids_BT).result().logits, plain)
        assert torch.equal(other.submit(activations_at, model, module, ids_BT).result(), acts_BTD)
        assert not torch.allclose(model(ids_BT).logits, plain)


def test_rows_leave_out_the_first_positions(tiny_llama):
    model = load_model(tiny_llama, "cpu", "float32")
    module, _ = find_hookpoint(model, TEMPLATES["mlp_sublayer"], 1)
    ids_BT = torch.arange(12).view(2, 6)
    acts_BTD = activations_at(model, module, ids_BT)
    (rows_ND,) = activation_rows(model, module, [ids_BT], skip_positions=2)
    assert torch.equal(rows_ND, torch.cat([acts_BTD[0, 2:], acts_BTD[1, 2:]]))


def test_prefetch_works_while_its_reader_does():
    """What follows is being made while the reader still holds the item before."""
    making = [threading.Event() for _ in range(4)]

    def make():
        for event in making:
            event.set()
            yield event

    for number, _item in enumerate(prefetch(make(), depth=1)):
        assert making[min(number + 1, 3)].wait(30)


def test_prefetch_keeps_order_raises_and_stops():
    assert list(prefetch(iter(range(50)), depth=3)) == list(range(50))

    def failing():
        yield 1
        raise InputError("from the thread")

    stream = prefetch(failing())
    assert next(stream) == 1
    with pytest.raises(InputError, match="from the thread"):
        next(stream)
    made = []
    endless = prefetch(made.append(n) or n for n in itertools.count())
    assert next(endless) == 0
    endless.close()
    assert len(made) <= 5


GPUS = torch.cuda.device_count()


@pytest.mark.parametrize(
    ("source", "sink"),
    [
        ("cpu", "cpu"),
        pytest.param("cpu", "cuda:0", marks=pytest.mark.skipif(not GPUS, reason="no GPU here")),
        pytest.param("cuda:0", "cuda:1", marks=pytest.mark.skipif(GPUS < 2, reason="no two GPUs here")),
    ],
)
def test_chunks_arrive_on_another_device_as_they_were_made(source, sink):
    """So large that a copy would still be under way when its reader looks, or its memory be used again."""

    def chunks():
        for number in range(20):
            yield torch.full((1000, 1000), float(number), device=source).cumsum(0)

    want_ND = torch.arange(1, 1001.0)[:, None].expand(-1, 1000)
    for number, chunk_ND in enumerate(carried(chunks(), torch.device(sink))):
        assert chunk_ND.device == torch.device(sink)
        assert torch.equal(chunk_ND.cpu(), number * want_ND)


def test_hookpoints_inside_experts_are_refused(tiny_llama):
    """Each expert sees some of the tokens, in an order of its own."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=50, num_hidden_layers=1, **sizes))
    with pytest.raises(InputError, match=r"all tokens, 'model\.layers\.0\.mlp\.experts\.act_fn' is in"):
        find_hookpoint(model, "model.layers.{}.mlp.experts.act_fn", 0)
    inside = model.model.layers[0].mlp.experts.act_fn
    with pytest.raises(InputError, match=r"a row for each of \[1, 5\] tokens, this has \[10, 24\]"):
        activations_at(model, inside, torch.arange(5)[None])
    assert not inside._forward_hooks
