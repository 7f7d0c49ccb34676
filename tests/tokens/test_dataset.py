"""The dataset on disk: what opens, what it holds, whose tokenizer made it."""

import hashlib
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import run_script, write_dataset
from tokenising import FLAGS, write
from tokenizers import Tokenizer

from sae import InputError
from sae.tokens import dataset as tokens


def test_a_dataset_that_is_none_is_refused(tmp_path, small_dataset):
    dataset, info = tokens.open_dataset(small_dataset)
    assert len(dataset) == info["rows"]
    folder = write_dataset(tmp_path / "other", [[1, 2, 3]] * 4, [0, 0, 1, 1], "some tokenizer")
    info_path = tmp_path / "other" / tokens.INFO_FILE
    info = json.loads(info_path.read_text())
    for change, words in (
        ({"rows": 5}, "5 contexts of 3"),
        ({"min_tokens": 4}, "of 3"),
        ({"vocab_size": "9"}, "vocab"),
    ):
        info_path.write_text(json.dumps(info | change))
        with pytest.raises(InputError, match=words):
            tokens.open_dataset(folder)
    for content in ("[]", "{", "{}"):
        info_path.write_text(content)
        with pytest.raises(InputError):
            tokens.open_dataset(folder)
    with pytest.raises(InputError, match="no such folder"):
        tokens.open_dataset(tmp_path / "nowhere")
    whole, info = datasets.load_from_disk(small_dataset), Path(small_dataset) / tokens.INFO_FILE
    for rows, kept, words in (
        (len(whole), ["input_ids"], "lacks document"),
        (0, ["input_ids", "document"], "does not open"),
    ):
        whole.select(range(rows)).select_columns(kept).save_to_disk(tmp_path / words[:5])
        (tmp_path / words[:5] / info.name).write_text(
            json.dumps(json.loads(info.read_text()) | {"rows": rows})
        )
        with pytest.raises(InputError, match=words):
            tokens.open_dataset(tmp_path / words[:5])


def test_contexts_are_read_in_the_order_asked_for(tmp_path):
    dataset, _info = tokens.open_dataset(
        write_dataset(tmp_path / "d", [[n, n + 10, n + 20] for n in range(5)], range(5), "some tokenizer")
    )
    batches = [ids_BT.tolist() for ids_BT in tokens.read_contexts(dataset, [4, 0, 3], 2, num_tokens=2)]
    assert batches == [[[4, 14], [0, 10]], [[3, 13]]]


def test_a_file_of_contexts_and_its_fingerprint(tmp_path):
    ids_NT, documents_N = np.arange(11, -1, -1, dtype=np.int32).reshape(4, 3), np.array([0, 0, 5, 9])
    whole = tokens.write_arrow(tmp_path / "whole.arrow", [(ids_NT, documents_N)], 3)
    halves = [(ids_NT[:1], documents_N[:1]), (ids_NT[1:], documents_N[1:])]
    assert tokens.write_arrow(tmp_path / "halves.arrow", halves, 3) == whole
    hashes = [hashlib.sha256(array.tobytes()).digest() for array in (ids_NT, documents_N)]
    assert whole == (4, hashlib.sha256(hashes[0] + hashes[1]).hexdigest(), 11)
    read = datasets.Dataset.from_file(str(tmp_path / "halves.arrow"))
    assert read["input_ids"][:] == ids_NT.tolist() and read["document"][:] == documents_N.tolist()
    assert tokens.write_arrow(tmp_path / "other.arrow", [(ids_NT, documents_N + 1)], 3)[1] != whole[1]


def test_the_fingerprint_of_a_dataset_is_of_all_its_files(tmp_path):
    plan = FLAGS | {"tokenizer_fingerprint": "", "vocab_size": 9, "suite_version": ""}
    made = set()
    for files in ([("a", 1), ("b", 8)], [("a", 1), ("c", 8)], [("d", 8), ("b", 1)]):
        tokens.write_info(tmp_path, plan, files, {})
        info = json.loads((tmp_path / tokens.INFO_FILE).read_text())
        made.add(info["fingerprint"])
        assert (info["max_token_id"], info["rows"]) == (8, 60)
    assert len(made) == 3


def test_the_fingerprint_of_a_tokenizer_is_that_of_its_vocabulary(tokenizer_copy):
    text = (Path(tokenizer_copy) / "tokenizer.json").read_text()
    spec = json.loads(text)
    fingerprint = tokens.tokenizer_fingerprint(text)
    # As other versions of the library spell the same tokenizer.
    merges = [" ".join(m) if isinstance(m, list) else m for m in spec["model"]["merges"]]
    model = spec["model"] | {"merges": merges, "new_setting": None}
    model["vocab"] = dict(sorted(model["vocab"].items()))
    added = [{"id": each["id"], "content": each["content"]} for each in spec["added_tokens"][::-1]]
    other = {"added_tokens": added, "model": model, "truncation": {"max_length": 3}}
    assert tokens.tokenizer_fingerprint(json.dumps(other, indent=3)) == fingerprint
    model["merges"] = [merge.split(" ") for merge in merges]
    assert tokens.tokenizer_fingerprint(json.dumps(other)) == fingerprint
    # Another one: two tokens change places, a merge fewer, a token more.
    vocab = model["vocab"]
    first, second = list(vocab)[1000:1002]
    for change in (
        {"vocab": vocab | {first: vocab[second], second: vocab[first]}},
        {"merges": merges[:-1]},
        {"vocab": vocab | {"new token": len(vocab)}},
    ):
        assert tokens.tokenizer_fingerprint(json.dumps(other | {"model": model | change})) != fingerprint
    added.append({"id": 60_000, "content": "<new>"})
    assert tokens.tokenizer_fingerprint(json.dumps(other | {"added_tokens": added})) != fingerprint
    unigram = {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}
    swapped = unigram | {"vocab": unigram["vocab"][::-1]}
    both = [
        tokens.tokenizer_fingerprint(json.dumps({"added_tokens": [], "model": m})) for m in (unigram, swapped)
    ]
    assert both[0] != both[1]


def _other_tokenizer(folder, tokenizer_copy):
    """SmolLM2's tokenizer with two tokens in each other's places: the same size, another meaning."""
    shutil.copytree(tokenizer_copy, folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    first, second = list(vocab)[1000:1002]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def test_a_dataset_of_another_tokenizer_is_refused(tmp_path, tokenizer_copy, stdlib, tiny_llama, capsys):
    write(tmp_path / "out", tokenizer_copy, dataset_name=stdlib, tokenizer_name="some/name")
    _dataset, info = tokens.open_dataset(tmp_path / "out")
    tokens.check_tokenizer(info, tokenizer_copy)
    tokens.check_tokenizer(info, tiny_llama)
    other = _other_tokenizer(tmp_path / "other", tokenizer_copy)
    with pytest.raises(InputError, match=r"other.*some/name.*--allow_other_tokenizer"):
        tokens.check_tokenizer(info, str(other))
    tokens.check_tokenizer(info, str(other), allow_other=True)
    # Version 0.1 took the fingerprint of a file, which another version of a library writes otherwise.
    tokens.check_tokenizer(info | {"tokenizer_fingerprint": "0123456789abcdef"}, str(other))
    tokens.check_tokenizer({"tokenizer_name": "some/name"}, str(other))
    (tmp_path / "none").mkdir()
    tokens.check_tokenizer(info, str(tmp_path / "none"))
    assert "has no tokenizer to compare" in capsys.readouterr().out


def test_training_and_sampling_refuse_a_dataset_of_another_tokenizer(
    tmp_path, tokenizer_copy, stdlib, tiny_llama, monkeypatch
):
    import generate_interpretation_samples as sampling
    import train_autoencoder_from_tokens as training_script
    from sae import samples, training
    from sae.processes import Processes

    write(tmp_path / "data", tokenizer_copy, dataset_name=stdlib, tokenizer_name="some/name")
    other = _other_tokenizer(tmp_path / "other", tokenizer_copy)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(tiny_llama) / name, other)

    def prepare(script, *flags):
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, flags)])
        flags = vars(script.parse_args()[1])
        if script is training_script:
            return training.prepare(flags)
        return samples.prepare(Processes(0, 1, None), **flags)

    train = [
        1, "mlp_activations", "--dataset_path", tmp_path / "data", "--model_name", other,
        "--save_path", tmp_path / "run", "--num_batches", 1, "--batch_size_autoencoder", 64,
    ]  # fmt: skip
    words = r"other .*some/name.*--allow_other_tokenizer"
    with pytest.raises(InputError, match=words):
        prepare(training_script, *train)
    result = run_script(f"{training_script.__name__}.py", *train, "--allow_other_tokenizer")
    assert result.returncode == 0, result.stderr
    sample = [
        4, "--dataset_path", tmp_path / "data", "--autoencoder_path", tmp_path / "run" / "1.pt",
        "--save_path", tmp_path / "samples.pt",
    ]  # fmt: skip
    with pytest.raises(InputError, match=words):
        prepare(sampling, *sample)
    assert prepare(sampling, *sample, "--allow_other_tokenizer")


def test_the_tokenizers_own_copy_is_preferred_to_its_name(tmp_path, tokenizer_copy, stdlib, monkeypatch):
    write(tmp_path / "out", tokenizer_copy, dataset_name=stdlib, tokenizer_name="./not/here")
    _dataset, info = tokens.open_dataset(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    loaded = tokens.load_tokenizer("out", info)
    assert (
        loaded("import os")["input_ids"]
        == Tokenizer.from_file(f"{tokenizer_copy}/tokenizer.json").encode("import os").ids
    )
    assert loaded.chat_template
    shutil.rmtree(tmp_path / "out" / "tokenizer")
    with pytest.raises(InputError, match="not/here"):
        tokens.load_tokenizer("out", info)
    assert len(tokens.load_tokenizer("out", info | {"tokenizer_name": tokenizer_copy})) == 49152
