"""The interpretation script as a user starts it: whatever processes share, the same documents; refusals."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, run_script, write_dataset
from servers import KEY, api_key, meeting_port
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from interpret_autoencoder_deepspeed import parse_args
from sae import explanations
from sae.artifacts import fingerprint
from sae.autoencoder import Autoencoder, save_checkpoint
from sae.explanations import prompts
from sae.explanations.elastic import as_sent, connect
from sae.processes import Processes
from sae.samples import RANDOM, TOP, Samples, save_samples
from sae.tokens import open_dataset

LENGTH, SKIP = 24, 2
# Planted features: each fires on the tokens with this text, (2 + place in the context / 10) strong.
WORDS = ["import", "def", "self", "(", ".", "="]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, smollm2, stdlib_contexts):
    """Folder with tokens/, ae.pt and samples.pt that belong together: real code, planted activations."""
    folder = tmp_path_factory.mktemp("interpret")
    ids, documents = [row[:LENGTH] for row in stdlib_contexts[0]], stdlib_contexts[1]
    write_dataset(folder / "tokens", ids, documents, smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [[text.strip() for text in prompts.token_texts(tokenizer, row)] for row in ids]
    strength = torch.arange(LENGTH) / 10 + 2
    strength[:SKIP] = 0
    acts_FNT = torch.stack(
        [torch.tensor([[text == word for text in row] for row in texts]) * strength for word in WORDS]
    )
    config = {
        "act_vec_size": 8, "dict_vec_size": 16, "layer_id": 3, "layer_type": "mlp_sublayer",
        "hookpoint": "model.layers.3.mlp", "model_name": smollm2, "learning_rate": 1e-4,
        "l1_coefficient": 1.0, "num_tokens": 0, "skip_positions": SKIP, "min_tokens": LENGTH,
        "tokenizer_name": smollm2,
    }  # fmt: skip
    frequency = torch.full((16,), -1.25)
    save_checkpoint(folder / "ae.pt", config, Autoencoder(8, 16), frequency)
    rows, document = [], torch.tensor(documents)
    for f in range(len(WORDS)):
        order = acts_FNT[f].amax(1).argsort(descending=True, stable=True).tolist()
        chosen = []
        for row in [*order[:40], *reversed(range(len(ids)))]:
            if len(chosen) < 12 and documents[row] not in document[chosen].tolist():
                chosen.append(row)
        rows.append(chosen)
    rows_FK = torch.tensor(rows)
    samples = Samples(
        config, open_dataset(folder / "tokens")[1]["fingerprint"], fingerprint(folder / "ae.pt"), 5000,
        frequency, torch.arange(1, 2 * len(WORDS), 2), acts_FNT.amax((1, 2)), rows_FK,
        torch.stack([acts_FNT[f, rows_FK[f]] for f in range(len(WORDS))]).half(),
        torch.tensor([[TOP] * 8 + [RANDOM] * 4] * len(WORDS), dtype=torch.int8),
    )  # fmt: skip
    save_samples(folder / "samples.pt", samples)
    (folder / "key").write_text(api_key())
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, smollm2):
    """Folder of a small Llama that has strong opinions: random weights, larger than a real model's."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return str(folder)


def options(folder, inputs, model, **flags):
    chosen = {
        "dataset_path": inputs / "tokens", "interpretation_samples_path": folder / "samples.pt",
        "autoencoder_path": inputs / "ae.pt", "interpretation_model_name": model, "num_gpus": 1,
        "num_interpretation_samples": 2, "num_simulation_samples": 2, "batch_size": 2, "dtype": "float32",
        "server_patience": 30,
    } | flags  # fmt: skip
    return [str(part) for name, value in chosen.items() for part in (f"--{name}", value)]


def start(folder, inputs, elasticsearch_url, model, **flags):
    """The script under the real launcher, in a process group of its own; its output goes to `folder`/log."""
    folder.mkdir(exist_ok=True)
    (folder / "samples.pt").write_bytes((inputs / "samples.pt").read_bytes())
    count, port = str(flags.get("num_gpus", 1)), str(meeting_port())
    command = [Path(sys.executable).parent / "deepspeed", "--num_gpus", count, "--master_port", port]
    command += [ROOT / "interpret_autoencoder_deepspeed.py", elasticsearch_url, f"@{inputs / 'key'}"]
    with open(folder / "log", "wb") as out:
        return subprocess.Popen(
            [*command, *options(folder, inputs, model, **flags)],
            stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip


def finish(process, folder, timeout=400):
    """(exit status, output, documents in the journal)."""
    try:
        status = process.wait(timeout)
    finally:
        end(process)
    path = folder / "samples.explanations.jsonl"
    return status, (folder / "log").read_text(), [json.loads(line) for line in path.read_text().splitlines()]


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, inputs, elasticsearch_url, model):
    folder = tmp_path_factory.mktemp("alone")
    return finish(start(folder, inputs, elasticsearch_url, model, index="sae-alone"), folder)


def test_documents_have_what_the_contract_asks(alone, inputs, elasticsearch_url, model):
    status, said, documents = alone
    assert status == 0, said
    assert "6 features explained: median score" in said and "features/minute" in said
    assert [document["dim"] for document in documents] == [1, 3, 5, 7, 9, 11]
    first = documents[0]
    assert (first["layer"], first["layer_type"], first["interpretation_model"]) == (3, "mlp_sublayer", model)
    assert first["tokens"] == ["import"] and first["interpretation"]
    assert -1 <= first["interval"][0] <= first["interval"][1] <= 1
    assert -1 <= first["score"] <= 1 and first["score_reason"] is None
    # Each is controlled by the next in the file whose explanation means something else.
    assert [document["control_dim"] for document in documents] == [3, 5, 7, 9, 11, 1]
    assert (first["interpretation"], first["explained_by"]) == ("the word import", "counted")
    assert first["score"] > 0.5 > abs(first["control"]) and first["counting"] > 0.5
    for context in (*first["shown"], *first["scored"]):
        assert {context["text"][start:end].strip() for start, end in context["marks"]} <= {"import"}
    assert len(first["simulated"]) == len(first["scored"]) > 2
    assert (first["simulation"], first["samples_fingerprint"]) == (
        "contrastive",
        fingerprint(inputs / "samples.pt"),
    )
    client = connect(elasticsearch_url, api_key())
    assert client.get(index="sae-alone", id="1")["_source"] == as_sent(first)


@pytest.mark.parametrize("parallel", ["tensor", "data"])
def test_two_processes_give_the_documents_of_one(parallel, alone, inputs, elasticsearch_url, model, tmp_path):
    process = start(
        tmp_path, inputs, elasticsearch_url, model, num_gpus=2, parallel=parallel, index=f"sae-{parallel}"
    )
    status, said, documents = finish(process, tmp_path)
    assert status == 0, said
    assert len(documents) == len(WORDS)
    for mine, theirs in zip(sorted(documents, key=lambda each: each["dim"]), alone[2], strict=True):
        assert_alike(mine | {"time": ""}, theirs | {"time": ""})


def assert_alike(mine, theirs):
    """Sums in another order differ in the last bits; the documents keep four digits, of simulations three."""
    assert type(mine) is type(theirs)
    if isinstance(theirs, dict):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            assert_alike(mine[name], theirs[name])
    elif isinstance(theirs, list):
        for one, other in zip(mine, theirs, strict=True):
            assert_alike(one, other)
    else:
        assert mine == (pytest.approx(theirs, abs=2e-3) if isinstance(theirs, float) else theirs)


def test_stopped_by_a_signal_it_journals_the_step_and_goes_on_to_the_same(
    alone, inputs, elasticsearch_url, model, tmp_path
):
    """In groups of one, so that there is something left to stop; groups decide nothing."""
    flags = {"index": "sae-stop", "batch_size": 1}
    process, path = (
        start(tmp_path, inputs, elasticsearch_url, model, **flags),
        tmp_path / "samples.explanations.jsonl",
    )
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does for Ctrl-C
    status, said, documents = finish(process, tmp_path)
    assert status != 0 and "the same command goes on" in said
    assert 'deepspeed.py", line' not in said  # a traceback of ours; the launcher has one of its own
    assert 1 <= len(documents) < len(WORDS)
    status, said, documents = finish(start(tmp_path, inputs, elasticsearch_url, model, **flags), tmp_path)
    assert status == 0, said
    assert_alike([{**d, "time": ""} for d in documents], [{**d, "time": ""} for d in alone[2]])


def test_without_deepspeed_it_is_refused(inputs, model, tmp_path):
    flags = options(inputs, inputs, model)
    assert_refused(
        run_script("interpret_autoencoder_deepspeed.py", "localhost:9", KEY, *flags), "deepspeed --num_gpus"
    )


def refused(inputs, model, *words, **flags):
    """The script as a process that deepspeed started, with nothing to talk to at the other end."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    command = [
        "interpret_autoencoder_deepspeed.py",
        "127.0.0.1:9",
        KEY,
        *options(inputs, inputs, model, **flags),
    ]
    result = run_script(*command, env=rank)
    assert_refused(result, *words)
    assert KEY not in result.stderr
    assert not (inputs / "samples.explanations.jsonl").exists()


def test_bad_input_is_refused_in_one_line(inputs, model, tmp_path):
    refused(inputs, model, "--num_gpus 1 needed", "got 4", num_gpus=4)
    refused(inputs, model, "127.0.0.1:9", "Connection refused")
    refused(inputs, model, tmp_path, "no such folder", dataset_path=tmp_path / "none")
    refused(inputs, model, "no such file", interpretation_samples_path=tmp_path / "none.pt")
    other = tmp_path / "other.pt"
    save_checkpoint(other, {}, Autoencoder(8, 17), torch.zeros(17))
    refused(inputs, model, fingerprint(other), fingerprint(inputs / "ae.pt"), autoencoder_path=other)
    cut = tmp_path / "cut.pt"
    cut.write_bytes((inputs / "samples.pt").read_bytes()[:1000])
    refused(inputs, model, "cut.pt", "truncated", interpretation_samples_path=cut)
    refused(inputs, tmp_path / "nomodel", "nomodel")
    # A key in two words: it is not shown.
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    result = run_script("interpret_autoencoder_deepspeed.py", "host", "ApiKey", "s3cret", env=environment)
    assert result.returncode == 2 and "--help needed alone, more came: ..." in result.stderr
    assert "s3cret" not in result.stderr + result.stdout


def test_what_was_made_with_other_settings_is_not_gone_on_with(
    alone, inputs, elasticsearch_url, model, tmp_path
):
    """Neither its journal nor, where there is none, its index. What a server rejects is named."""
    (tmp_path / "samples.pt").write_bytes((inputs / "samples.pt").read_bytes())
    journal = tmp_path / "samples.explanations.jsonl"
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    server, key = elasticsearch_url, f"@{inputs / 'key'}"

    def start_with(**flags):
        flags = options(tmp_path, inputs, model, index="sae-alone", **flags)
        return run_script("interpret_autoencoder_deepspeed.py", server, key, *flags, env=rank)

    rejected = [document | {"time": "noon"} if document["dim"] == 3 else document for document in alone[2]]
    journal.write_text("".join(json.dumps(document) + "\n" for document in rejected))
    result = start_with()
    assert result.returncode == 3 and "feature 3: rejected by the server: [" in result.stderr
    result = start_with(simulation="expected")
    assert_refused(result, "other", "simulation", "contrastive instead of expected", journal, "move it away")
    journal.unlink()
    assert_refused(start_with(seed=3), "sae-alone", "seed=0", "seed=3", "--index names another")
    assert not journal.exists()


def test_documents_say_where_they_come_from_and_what_read_them(inputs, model, monkeypatch):
    for flags, words in (({}, ""), ({"simulation_model_name": model}, f" simulation_model={model}")):
        monkeypatch.setattr(sys, "argv", ["", "host", "key", *options(inputs, inputs, model, **flags)])
        work = explanations.prepare(Processes(1, 2, "cpu"), **vars(parse_args()[1]))
        assert work.origin["settings"].endswith(f" seed=0 dtype=float32{words}")
    said = [work.origin[name] for name in ("layer", "layer_type", "hookpoint", "interpretation_model")]
    assert said == [3, "mlp_sublayer", "model.layers.3.mlp", model]
    assert work.origin["dataset_fingerprint"] == open_dataset(inputs / "tokens")[1]["fingerprint"]
    for what, path in (("autoencoder", "ae.pt"), ("samples", "samples.pt")):
        assert work.origin[f"{what}_fingerprint"] == fingerprint(inputs / path)


def test_one_line_for_all_processes(inputs, elasticsearch_url, model, tmp_path):
    process = start(tmp_path, inputs, elasticsearch_url, model, num_gpus=2, dataset_path=tmp_path / "none")
    try:
        assert process.wait(200) == 2
    finally:
        end(process)
    said = (tmp_path / "log").read_text()
    assert said.count("a tokenised dataset needed") == 1 and "Traceback" not in said
