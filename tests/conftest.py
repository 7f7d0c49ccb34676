"""What the tests share: the real inputs, a tiny real model, and scripts started as a user starts them."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ROOT / "inputs"
# Nothing here may ask a hub; sums must not depend on how many cores the machine has.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_BUILD_OPS": "0"}
os.environ["OMP_NUM_THREADS"] = "1"


# Files of tests that take longest: first, so that two workers end about together.
FIRST = ("train_script", "end_to_end", "processes", "interpret_faults", "test_run", "workers", "exact")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [not item.path.stem.endswith(name) for name in FIRST])


@pytest.fixture(scope="session")
def smollm2():
    """Folder of the real SmolLM2-135M-Instruct."""
    return str(INPUTS / "smollm2")


@pytest.fixture(scope="session")
def stdlib():
    """Folder with the source files of Python's standard library."""
    return INPUTS / "stdlib"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a Llama with 3 layers, width 32, random weights, and SmolLM2's tokenizer: starts at once."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(INPUTS / "smollm2").save_pretrained(folder)
    return str(folder)


def write_dataset(folder, ids, documents, tokenizer_name, vocab_size=49152):
    """A tokenised dataset as the contract has it, from rows of ids; returns `folder` as a string."""
    import hashlib

    import datasets
    import numpy as np

    length = len(ids[0])
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32"), length=length),
            "document": datasets.Value("int64"),
        }
    )
    rows = {"input_ids": np.asarray(ids, dtype="int32"), "document": np.asarray(documents, dtype="int64")}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    info = {
        "tokenizer_name": str(tokenizer_name), "vocab_size": vocab_size, "dataset_name": "made by the tests",
        "min_tokens": length, "seed": 0, "rows": len(ids),
        "fingerprint": hashlib.sha256(str(ids).encode()).hexdigest()[:16],
    }  # fmt: skip
    (Path(folder) / "tokenized_dataset.json").write_text(json.dumps(info))
    return str(folder)


@pytest.fixture(scope="session")
def stdlib_contexts(smollm2, stdlib):
    """Real code as ids: (ids [240][64], documents [240]), two contexts of each of 120 library files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids, documents = [], []
    for number, file in enumerate(sorted(stdlib.glob("*.py"))):
        tokens = tokenizer(file.read_text(errors="ignore"), add_special_tokens=False)["input_ids"]
        if len(tokens) >= 400 and len(ids) < 240:
            ids += [tokens[:64], tokens[200:264]]
            documents += [number, number]
    return ids, documents


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory, stdlib_contexts, smollm2):
    """A tokenised dataset of 240 real contexts of 64 tokens."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "tokens", *stdlib_contexts, smollm2)


@functools.cache
def _warm():
    """What runs the scripts (warm.py); ends when this process does."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, ROOT / "tests" / "warm.py"]
    return subprocess.Popen(command, text=True, start_new_session=True, **streams)


def _run(words, timeout, cwd, env, fresh=False):
    words, env = list(map(str, words)), os.environ | (env or {})
    if fresh:
        command, how = [sys.executable, *words], {"capture_output": True, "text": True, "check": False}
        return subprocess.run(command, timeout=timeout, cwd=cwd, env=env, **how)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        asked = [words, str(cwd or os.getcwd()), env, str(out), str(err), timeout]
        try:
            _warm().stdin.write(json.dumps(asked) + "\n")
            _warm().stdin.flush()
            status = int(_warm().stdout.readline())
        except BaseException:  # a test that is stopped here must not leave its answer to the next one
            os.killpg(_warm().pid, signal.SIGKILL)
            _warm.cache_clear()
            raise
        return subprocess.CompletedProcess(words, status, out.read_text(), err.read_text())


def run_script(script, *args, timeout=300, cwd=None, env=None, fresh=False):
    """Run a top-level script as a user does; returns the CompletedProcess with text streams.

    In a process of its own that need not import torch again; `fresh`: in one that has to, as a user's has.
    """
    return _run([ROOT / script, *args], timeout, cwd, env, fresh)


def run_module(module, *args, timeout=300, env=None, fresh=False):
    """Run `python -m module` from the repository as a user does; returns the CompletedProcess."""
    return _run(["-m", module, *args], timeout, ROOT, env, fresh)


def assert_refused(result, *words):
    """One line on standard error that has all of `words`, exit status 2."""
    assert result.returncode == 2, (result.returncode, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


@pytest.fixture(scope="session")
def elasticsearch_url():
    """A real server: the one that ELASTICSEARCH_URL names, or a noida-db of this session's own."""
    from servers import elasticsearch

    with elasticsearch() as url:
        yield url


@pytest.fixture(scope="session")
def tokenizer_copy(tmp_path_factory, smollm2):
    """Folder with SmolLM2's tokenizer alone, as `save_pretrained` writes it."""
    import shutil

    folder = tmp_path_factory.mktemp("tokenizer_copy")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(smollm2) / name, folder)
    return str(folder)
