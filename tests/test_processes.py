"""Real processes, and what they do together: a model in shares, work handed out."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from servers import meeting_port
from transformers import AutoConfig, AutoModelForCausalLM

from sae.processes import Processes

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
processes.Parser("").exit()
"""


HANDED_OUT = """
import json, os, sys, time
from datetime import timedelta
from torch.distributed.distributed_c10d import _set_pg_timeout
from sae import processes
here = processes.join(2)

def work(item):
    begun.append(item)
    if how == "uneven":  # the first item lasts until the others are done, and longer than a process waits
        _set_pg_timeout(timedelta(seconds=1))
        while here.store.add("done", int(item > 0)) < 5 and item == 0:
            time.sleep(0.01)
        time.sleep(2 * (item == 0))
    while how == "stop" and here.rank == 0 and here.store.add("given", 0) <= 6 and time.monotonic() < late:
        time.sleep(0.01)  # until nothing is left to take
    if how == "death" and here.rank == 1 and len(begun) == 3:
        here.store.set("dead", "")
        os.kill(os.getpid(), 9)
    if how == "death" and here.rank == 0:
        here.store.wait(["dead"])
    return {"rank": here.rank, "item": item, "long": "x" * (9 * 2**20 if how == "uneven" and item else 0)}

def stopping():
    return how == "stop" and here.rank == 1 and len(begun) == 2

for how in ("uneven", "stop", "death"):
    begun, results, lost, late = [], [], "", time.monotonic() + 9
    try:
        for result in here.hand_out(range(6), work, stopping):
            results.append(result | {"long": len(result["long"])})
    except processes.Lost as err:
        lost = str(err)
    _set_pg_timeout(timedelta(seconds=60))
    print(json.dumps(["", begun, results, lost]), flush=True)
processes.Parser("").exit(2)
"""

ENDING = """
import atexit, os, sys
from sae import processes
with processes.Parser("").friendly_errors():
    here = processes.join(2)
    atexit.register(os.abort)  # as a thread of torch did once, in a run whose work was done
    sys.stdout.write(f'["{here.from_first(1)}"]')
    sys.exit(3 * here.rank)
"""


def together(program, *args, port=None, ranks="01"):
    """[(status, output lines that are JSON, what it said elsewhere)] of these of two processes."""
    port, started = str(port or meeting_port()), []
    for rank in ranks:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = os.environ | place | {"MASTER_PORT": port, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
        command = [sys.executable, "-c", program, *map(str, args)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=env, text=True, **streams))
    ended = []
    for process in started:
        try:
            out, err = process.communicate(timeout=240)
        finally:
            process.kill()
        said = [json.loads(line) for line in out.splitlines() if line.startswith('["')]  # DeepSpeed talks too
        ended.append((process.returncode, said, err))
    return ended


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_llama):
    """Models that go round among two processes, whose heads or keys do not, without a plan; broken ones."""
    made = [tmp_path_factory.mktemp(name) for name in ("odd", "one", "opt", "gpt2", "lacking", "longer")]
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 96}
    one = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    one |= {"num_key_value_heads": 1}
    opt = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt |= {"word_embed_proj_dim": 32, "pad_token_id": 0}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    kinds = {"gpt_neox": sizes, "llama": one, "opt": opt, "gpt2": gpt2}
    for folder, (kind, config) in zip(made, kinds.items(), strict=False):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=96, initializer_range=0.2, **config)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    weights = load_file(f"{tiny_llama}/model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    lacking = {name: each for name, each in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}
    longer = weights | {"model.embed_tokens.weight": torch.cat([embedding, embedding[:1]])}
    for folder, changed in zip(made[4:], (lacking, longer), strict=True):
        AutoConfig.from_pretrained(tiny_llama).save_pretrained(folder)
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return [tiny_llama, *map(str, made)]


def test_shares_of_a_model_are_read_alone_and_give_what_the_whole_gives(folders):
    ended = together(SHARES, *folders)
    assert [status for status, _said, _err in ended] == [0, 0], ended
    even, odd, one, opt, gpt2, lacking, longer = ended[0][1]
    for (name, apart, held), most in ((even, 0.51), (odd, 0.7), (one, 0.7)):
        assert apart < 1e-4 and held < most, name
    assert opt[1] < 1e-4 and "--parallel data needed, DeepSpeed splits no gpt2" in gpt2[1]
    assert "no plan for shares" in ended[0][2] and "no plan for shares" not in ended[1][2]
    assert "lacks 1: model.layers.1.mlp.up_proj.weight" in lacking[1]
    assert "model.embed_tokens.weight of shape" in longer[1] and "a process's share" in longer[1]
    assert ended[1][1][4:] == [gpt2, lacking, longer]  # all refuse what one refuses


def test_processes_of_other_machines_are_no_neighbours(monkeypatch):
    here = Processes(0, 4, "cpu")
    for said, neighbours in (("", 4), ("2", 2), ("8", 4)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
        assert here.neighbours == neighbours


def test_shares_leave_nothing_over():
    shares = [Processes(rank, 3, "cpu").share(10) for rank in range(3)]
    assert shares == [slice(0, 3), slice(3, 6), slice(6, 10)]


@pytest.fixture(scope="module")
def handed_out():
    """Of both processes: the items that it began, the results it was given, what it lost; for three runs."""
    (status, first, _), (other_status, other, _) = together(HANDED_OUT)
    assert (status, other_status, len(first), len(other)) == (2, -9, 3, 2)
    assert [results for _, _, results, _ in other] == [[], []]
    return first, other


def test_who_is_free_gets_the_next_item_and_the_first_process_all_results(handed_out):
    (_, _, results, lost), *_ = handed_out[0]
    assert sorted(result["item"] for result in results) == list(range(6)) and not lost
    # More than the store takes at once comes in pieces.
    assert {result["long"] for result in results if result["item"]} == {9 * 2**20}
    (slow,) = (result["rank"] for result in results if result["item"] == 0)
    assert [result["item"] for result in results if result["rank"] == slow] == [0]


def test_a_stop_of_one_process_is_a_stop_of_all_and_loses_nothing(handed_out):
    (_, begun, results, lost), (_, other_begun, _, _) = handed_out[0][1], handed_out[1][1]
    assert sorted(result["item"] for result in results) == sorted(begun + other_begun) and not lost
    assert len(other_begun) == 2 and len(begun) <= 1


def test_what_was_finished_reaches_the_first_process_before_it_hears_of_a_death(handed_out):
    _, begun, results, lost = handed_out[0][2]
    items = [[result["item"] for result in results if result["rank"] == rank] for rank in (0, 1)]
    # The third item of the one that died is lost, and nothing else.
    assert items[0] == begun and len(items[1]) == 2 and len(begun) == 3
    assert "another one has ended" in lost


def test_the_end_of_a_process_is_its_own_status_whatever_torch_does():
    assert together(ENDING) == [(0, [["1"]], ""), (3, [["1"]], "")]


def test_a_port_that_another_run_has_is_one_line():
    with socket.create_server(("", 0)) as taken:
        ((status, said, line),) = together(ENDING, ranks="0", port=taken.getsockname()[1])
    assert (status, said, line.count("\n")) == (2, [], 1), line
    assert "a free port to meet at needed (deepspeed --master_port N)" in line and "in use" in line
