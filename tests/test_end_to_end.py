"""All four scripts as a user runs them: the real SmolLM2, two DeepSpeed processes, a real server."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, run_script

FEATURES = 4


@pytest.fixture(scope="module")
def suite(tmp_path_factory, smollm2, stdlib, elasticsearch_url):
    """The folder that the four scripts wrote to, and the index."""
    out = tmp_path_factory.mktemp("suite")
    tokens, run, samples = out / "tokens", out / "run", out / "samples.pt"

    def done(script, *args):
        result = run_script(script, *args, timeout=600, fresh=True)
        assert result.returncode == 0, result.stderr
        return result

    done("generate_tokenized_dataset.py", 2, 200, "--num_processes", 2, "--dataset_name", stdlib,
         "--tokenizer_name", smollm2, "--save_path", tokens)  # fmt: skip
    done("train_autoencoder_from_tokens.py", 3, "mlp_activations", "--dataset_path", tokens,
         "--save_path", run, "--model_name", smollm2, "--batch_size_autoencoder", 512,
         "--learning_rate", 1e-3, "--dict_vec_size", 512)  # fmt: skip
    (checkpoint,) = (path for path in run.glob("*.pt") if path.stem.isdigit())
    done("generate_interpretation_samples.py", 300, "--dataset_path", tokens,
         "--autoencoder_path", checkpoint, "--save_path", samples)  # fmt: skip
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [
        Path(sys.executable).parent / "deepspeed", "--num_gpus", 2, "--master_port", port,
        ROOT / "interpret_autoencoder_deepspeed.py", elasticsearch_url,
        os.environ.get("ELASTICSEARCH_API_KEY", "any"),
        "--num_gpus", 2, "--dataset_path", tokens, "--interpretation_samples_path", samples,
        "--autoencoder_path", checkpoint, "--interpretation_model_name", smollm2,
        "--max_features", FEATURES, "--index", f"end-to-end-{os.getpid()}",
    ]  # fmt: skip
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return out, checkpoint, samples, f"end-to-end-{os.getpid()}"


def test_every_feature_is_in_the_index_and_found_by_its_tokens(suite, elasticsearch_url):
    from elasticsearch import Elasticsearch

    index = suite[3]
    with Elasticsearch(elasticsearch_url) as client:
        client.indices.refresh(index=index)
        hits = client.search(index=index, size=100)["hits"]["hits"]
        assert len(hits) == FEATURES
        for hit in hits:
            document = hit["_source"]
            assert document["dim"] == int(hit["_id"])
            assert document["layer"] == 3
            assert document["interpretation"]
            assert isinstance(document["tokens"], list)
            assert document["score"] is None or -1 <= document["score"] <= 1
        word = next(t for hit in hits for t in hit["_source"]["tokens"] if t.isalpha() and t.isascii())
        found = client.search(index=index, q=word)["hits"]["hits"]
        assert any(word in hit["_source"]["tokens"] for hit in found)
        client.indices.delete(index=index)


def test_the_journal_holds_the_same(suite):
    lines = (suite[0] / "samples.explanations.jsonl").read_text().splitlines()
    assert len(lines) == FEATURES
    assert len({json.loads(line)["dim"] for line in lines}) == FEATURES


def test_every_pt_file_opens_without_unpickling(suite):
    paths = sorted(suite[0].rglob("*.pt"))
    assert len(paths) >= 3
    for path in paths:
        torch.load(path, weights_only=True)


def test_the_docs_name_every_field(suite):
    out, checkpoint, samples, _ = suite
    page, flags = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("files", "train"))
    saved, found = torch.load(samples, weights_only=True), torch.load(checkpoint, weights_only=True)
    info = json.loads((out / "tokens" / "tokenized_dataset.json").read_text())
    fields = {*info, *found, *saved, "scale_factor", "<samples stem>.png"}
    configs = {one for one in {*found["config"], *saved["config"]} if f"| `--{one}`" not in flags}
    lacking = [one for one in sorted(fields | configs) if f"`{one}`" not in page]
    assert lacking == ["layer_id"]  # the argument


def test_scripts_refuse_what_does_not_belong_together(suite, smollm2, stdlib, tmp_path):
    out, checkpoint, samples, _ = suite
    other = tmp_path / "other"
    result = run_script("generate_tokenized_dataset.py", 1, 50, "--dataset_name", stdlib,
                        "--tokenizer_name", smollm2, "--save_path", other)  # fmt: skip
    assert result.returncode == 0, result.stderr
    prints = [
        json.loads((p / "tokenized_dataset.json").read_text())["fingerprint"] for p in (other, out / "tokens")
    ]
    result = run_script("generate_interpretation_samples.py", 10, "--dataset_path", other,
                        "--autoencoder_path", checkpoint, "--save_path", tmp_path / "x.pt")  # fmt: skip
    assert_refused(result, *prints)
    result = run_script("generate_interpretation_samples.py", 10, "--dataset_path", out / "tokens",
                        "--autoencoder_path", samples, "--save_path", tmp_path / "x.pt")  # fmt: skip
    assert_refused(result, "autoencoder checkpoint", "state_dict")
    assert not (tmp_path / "x.pt").exists()
    result = run_script("interpret_autoencoder_deepspeed.py", "localhost:1", "key")
    assert_refused(result, "deepspeed")
