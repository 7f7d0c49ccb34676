"""Nothing lost: the real script under deepspeed on a tiny model, with failing servers and killed runs."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from conftest import ROOT, write_dataset
from servers import KEY, NoidaServer, Proxy, api_key, dropped, meeting_port, refusal, slow

from sae.activations import activations_at, find_hookpoint
from sae.artifacts import fingerprint
from sae.autoencoder import Autoencoder, save_checkpoint
from sae.explanations.elastic import as_sent, connect
from sae.samples import RANDOM, TOP, Samples, save_samples
from sae.tokens import open_dataset

KILLS = 5
FEATURES, CONTEXTS = 40, 6  # explained features; contexts kept of each kind
INDEX = "sae-faults"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_llama, stdlib_contexts):
    """Folder with tokens/, ae.pt and samples.pt that belong together: real code, a random autoencoder."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("faults")
    ids, documents = [row[:24] for row in stdlib_contexts[0][:60]], stdlib_contexts[1][:60]
    write_dataset(folder / "tokens", ids, documents, tiny_llama)
    autoencoder = Autoencoder(48, 96, rng=torch.Generator().manual_seed(0))
    config = {
        "act_vec_size": 48, "dict_vec_size": 96, "layer_id": 1, "layer_type": "mlp_activations",
        "hookpoint": "model.layers.1.mlp.act_fn", "model_name": tiny_llama, "learning_rate": 1e-4,
        "l1_coefficient": 1.0, "num_tokens": 0, "skip_positions": 0, "min_tokens": 24,
        "tokenizer_name": tiny_llama,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    module, _name = find_hookpoint(model, config["hookpoint"], 1)
    acts_NTF = autoencoder.features(activations_at(model, module, torch.tensor(ids)).flatten(0, 1))
    acts_NTF = acts_NTF.detach().view(len(ids), 24, 96)
    frequency_F = (acts_NTF > 0).float().mean((0, 1)).log10()
    save_checkpoint(folder / "ae.pt", config, autoencoder, frequency_F)

    features = ((frequency_F > -1.5) & (frequency_F < -0.01)).nonzero()[:FEATURES, 0]
    assert len(features) == FEATURES
    peak_FN = acts_NTF.amax(1).T[features]
    rng = torch.Generator().manual_seed(0)
    drawn_FK = torch.stack([torch.randperm(len(ids), generator=rng)[:CONTEXTS] for _ in features])
    rows_FK = torch.cat([peak_FN.topk(CONTEXTS).indices, drawn_FK], 1)
    kind_FK = torch.tensor([[TOP] * CONTEXTS + [RANDOM] * CONTEXTS] * FEATURES, dtype=torch.int8)
    acts_FKT = torch.stack([acts_NTF[rows, :, f] for rows, f in zip(rows_FK, features, strict=True)])
    save_samples(
        folder / "samples.pt",
        Samples(
            config, open_dataset(folder / "tokens")[1]["fingerprint"], fingerprint(folder / "ae.pt"),
            acts_NTF[..., 0].numel(), frequency_F, features, peak_FN.amax(1), rows_FK, acts_FKT.half(),
            kind_FK,
        ),
    )  # fmt: skip
    return folder


class Run(NamedTuple):
    folder: Path  # with samples.pt and the journal beside it
    inputs: Path
    model: str

    @property
    def journal(self):
        return self.folder / "samples.explanations.jsonl"

    def start(self, address, key="@key", log="log", **flags):
        """The script in a process group of its own: several under `deepspeed`, one as if started by it."""
        (self.folder / "key").write_text(KEY)
        options = {
            "dataset_path": self.inputs / "tokens", "interpretation_samples_path": self.folder / "samples.pt",
            "interpretation_model_name": self.model, "autoencoder_path": self.inputs / "ae.pt",
            "num_interpretation_samples": 1, "num_simulation_samples": 1, "num_gpus": 1, "batch_size": 2,
            "dtype": "float32", "index": INDEX, "server_patience": 60,
        } | flags  # fmt: skip
        port = str(meeting_port())
        launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", "--master_port", port]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} if options["num_gpus"] == 1 else {}
        command = [sys.executable] if alone else launcher
        command += [ROOT / "interpret_autoencoder_deepspeed.py", address, key]
        command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        with open(self.folder / log, "wb") as out:
            return subprocess.Popen(
                command, cwd=self.folder, stdout=out, stderr=out, start_new_session=True,
                env=os.environ | alone | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def finish(self, process, timeout=500):
        """(exit status, everything it printed); the key is in none of it."""
        try:
            status = process.wait(timeout)
        finally:
            kill(process)
        said = (self.folder / "log").read_text()
        assert KEY not in said
        assert not self.journal.exists() or KEY not in self.journal.read_text()
        return status, said

    def lines(self):
        return self.journal.read_bytes().count(b"\n") if self.journal.exists() else 0

    def documents(self):
        documents = map(json.loads, self.journal.read_text().splitlines())
        return {document["dim"]: timeless(as_sent(document)) for document in documents}

    def wait_for_lines(self, process, count):
        while self.lines() < count and process.poll() is None:
            time.sleep(0.01)


def kill(process):
    """kill -9 of the launcher and everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_one(launcher, rank):
    """kill -9 of one of the processes that it started."""
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            child.kill()


def timeless(document):
    return {key: value for key, value in document.items() if key != "time"}


def stored(server):
    client = connect(server.url, api_key())
    client.indices.refresh(index=INDEX)
    hits = client.search(index=INDEX, size=1000)["hits"]["hits"]
    assert all(hit["_id"] == str(hit["_source"]["dim"]) for hit in hits)
    return {hit["_source"]["dim"]: timeless(hit["_source"]) for hit in hits}


@pytest.fixture
def run(inputs, tiny_llama, tmp_path):
    shutil.copy(inputs / "samples.pt", tmp_path)
    return Run(tmp_path, inputs, tiny_llama)


@pytest.fixture
def server():
    with NoidaServer() as one:
        yield one


@pytest.fixture(scope="module")
def undisturbed(inputs, tiny_llama, tmp_path_factory):
    """The documents of a run that nothing befell."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(inputs / "samples.pt", folder)
    one = Run(folder, inputs, tiny_llama)
    with NoidaServer() as server:
        begun = time.monotonic()
        status, said = one.finish(one.start(server.url))
        assert status == 0, said
        print(f"an undisturbed run: {time.monotonic() - begun:.1f} s")
        documents = one.documents()
        assert len(documents) == one.lines() == FEATURES
        assert stored(server) == documents
    return documents


def test_a_server_that_is_killed_and_comes_back_in_the_middle(run, server, undisturbed):
    process = run.start(server.url)
    run.wait_for_lines(process, 6)
    server.restart(after_s=2)
    status, said = run.finish(process)
    assert status == 0, said
    assert run.documents() == undisturbed == stored(server)


def test_a_server_that_stays_away_costs_no_explanation(run, server, undisturbed):
    process = run.start(server.url, server_patience=2)
    run.wait_for_lines(process, 6)
    server.kill()
    status, said = run.finish(process)
    assert status == 3, said
    assert re.search("same command", said), said
    assert run.documents() == undisturbed

    server.start()
    before = run.journal.read_bytes()
    status, said = run.finish(run.start(server.url))
    assert status == 0, said
    assert run.journal.read_bytes() == before  # sent, not explained again
    assert stored(server) == undisturbed


def test_ctrl_c_ends_the_waiting_for_a_server_that_stays_away(run, server, undisturbed):
    process = run.start(server.url, server_patience=600)
    run.wait_for_lines(process, 6)
    server.kill()
    run.wait_for_lines(process, FEATURES)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    status, said = run.finish(process, timeout=100)
    assert status != 0 and "documents unsent" in said and "the same command sends them" in said, said
    assert run.documents() == undisturbed


def test_every_http_fault_in_turn(run, server, undisturbed):
    kinds = [dropped, lambda _r: refusal(429, "full"), lambda _r: refusal(503, "no master"), slow(1)]
    bulks = []

    def fault(request):
        """Every other bulk fails, each time in another way."""
        if not request.path.endswith("_bulk"):
            return None
        bulks.append(request)
        return kinds[len(bulks) // 2 % 4](request) if len(bulks) % 2 else None

    with Proxy(server.url, check_key=True) as proxy:
        proxy.fault = fault
        status, said = run.finish(run.start(proxy.address))
    assert status == 0, said
    assert len(bulks) > 1
    assert run.documents() == undisturbed == stored(server)


def test_a_key_that_is_refused_ends_before_any_model_is_loaded(run, server):
    with Proxy(server.url, check_key=True) as proxy:
        status, said = run.finish(run.start(proxy.address, key="wrong-key"))
    assert status == 2, said
    lines = [line for line in said.splitlines() if "interpret_autoencoder_deepspeed.py: error:" in line]
    assert len(lines) == 1, said
    assert "answered 401" in lines[0]
    assert "wrong-key" not in lines[0]
    assert "Traceback" not in said
    assert "Loading weights" not in said
    assert not run.journal.exists()


@pytest.mark.timeout(900)
def test_runs_killed_at_random_moments_end_with_the_same_documents(run, server, undisturbed):
    rng = random.Random(6)
    moments = []
    for number in range(KILLS):
        two = number == 0  # while most of the run is left: its last features end together
        process = run.start(server.url, **({"num_gpus": 2, "parallel": "data"} if two else {}))
        # After a random feature of this kill's share of the run; some before the first, while it starts.
        target = int(rng.uniform(number, number + 1) / (KILLS + 1) * FEATURES)
        if two:
            run.wait_for_lines(process, 1)
        elif target > run.lines():
            run.wait_for_lines(process, target)
            time.sleep(rng.uniform(0, 0.2))
        else:
            time.sleep(rng.uniform(0, 10))
        assert server.process.poll() is None, f"noida-db ended with {server.process.poll()}"
        assert process.poll() in (None, 0), (run.folder / "log").read_text()
        if two:
            kill_one(process, rank=0)
            assert process.wait(240) != 0
            said = (run.folder / "log").read_text()
            assert said.count("another one has ended") == 1 and "Traceback" not in said, said
        kill(process)
        moments.append(run.lines())
    print(f"documents in the journal at each kill: {moments}")
    assert any(0 < moment < FEATURES for moment in moments)
    status, said = run.finish(run.start(server.url))
    assert status == 0, said
    assert run.documents() == undisturbed == stored(server)
    assert run.lines() == FEATURES
