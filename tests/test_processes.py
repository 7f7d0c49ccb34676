"""Real processes, and what they do together: a model in shares, work handed out."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from servers import free_port
from transformers import AutoConfig, AutoModelForCausalLM

SHARES = """
import json, sys
import torch
from sae import InputError, models, processes
here = processes.join(2)
for name in sys.argv[1:]:
    try:
        share = processes.load_model(here, name, "float32", "tensor")
    except InputError as err:
        print(json.dumps([name, str(err)]), flush=True)
        continue
    ids_BT = torch.arange(20).view(2, 10)
    whole = models.load_model(name, "cpu", "float32")
    with torch.inference_mode():
        apart = (share(ids_BT).logits - whole(ids_BT).logits).abs().max().item()
    held = sum(getattr(each, "_local_tensor", each).numel() for each in share.parameters())
    print(json.dumps([name, apart, held / sum(each.numel() for each in whole.parameters())]), flush=True)
"""


def together(program, *args):
    """[(status, output lines that are JSON, what it said elsewhere)] of two processes that run `program`."""
    port, started = str(free_port()), []
    for rank in "01":
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = os.environ | ranks | {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program, *map(str, args)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=env, text=True, **streams))
    ended = []
    for process in started:
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        said = [json.loads(line) for line in out.splitlines() if line.startswith('["')]  # DeepSpeed talks too
        ended.append((process.returncode, said, err))
    return ended


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_llama):
    """Models that go round among two processes, whose heads do not, without a plan; two broken ones."""
    made = [tmp_path_factory.mktemp(name) for name in ("odd", "opt", "gpt2", "lacking", "longer")]
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 96}
    opt = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt |= {"word_embed_proj_dim": 32, "pad_token_id": 0}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    for folder, kind, config in zip(made, ("gpt_neox", "opt", "gpt2"), (sizes, opt, gpt2), strict=False):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=96, initializer_range=0.2, **config)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    weights = load_file(f"{tiny_llama}/model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    lacking = {name: each for name, each in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}
    longer = weights | {"model.embed_tokens.weight": torch.cat([embedding, embedding[:1]])}
    for folder, changed in zip(made[3:], (lacking, longer), strict=True):
        AutoConfig.from_pretrained(tiny_llama).save_pretrained(folder)
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return [tiny_llama, *map(str, made)]


def test_shares_of_a_model_are_read_alone_and_give_what_the_whole_gives(folders):
    ended = together(SHARES, *folders)
    assert [status for status, _said, _err in ended] == [0, 0], ended
    even, odd, opt, gpt2, lacking, longer = ended[0][1]
    for (name, apart, held), most in ((even, 0.51), (odd, 0.7)):
        assert apart < 1e-4 and held < most, name
    assert opt[1] < 1e-4 and "--parallel data needed, DeepSpeed splits no gpt2" in gpt2[1]
    assert "no plan for shares" in ended[0][2] and "no plan for shares" not in ended[1][2]
    assert "lacks 1: model.layers.1.mlp.up_proj.weight" in lacking[1]
    assert "model.embed_tokens.weight of shape" in longer[1] and "a process's share" in longer[1]
    assert ended[1][1][3:] == [gpt2, lacking, longer]  # all refuse what one refuses
