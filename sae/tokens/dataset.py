"""The tokenised dataset on disk: its Arrow files, what lies beside them, and reading them back."""

import hashlib
import json
from pathlib import Path

from sae import InputError, artifacts

INFO_FILE = "tokenized_dataset.json"
INFO_TYPES = {"tokenizer_name": str, "vocab_size": int, "min_tokens": int, "rows": int, "fingerprint": str}
TOKENIZER = "tokenizer"  # folder beside the files: the tokenizer's own copy


def open_dataset(path):
    """The dataset at `path` (columns `input_ids`, `document`) and its info (tokenizer_name, ...).

    Raises InputError where there is none, it is empty, or it is no tokenised dataset.
    """
    import datasets

    path, needed = Path(path), f"a tokenised dataset needed at {path}"
    if not (path / INFO_FILE).is_file():
        raise InputError(f"{needed}, {f'no {INFO_FILE} in it' if path.exists() else 'no such folder'}")
    try:
        info = json.loads((path / INFO_FILE).read_text())
        dataset = datasets.load_from_disk(str(path))
        lacking = [key for key, kind in INFO_TYPES.items() if not isinstance(info.get(key), kind)]
        lacking += sorted({"input_ids", "document"} - set(dataset.column_names))
    except (OSError, ValueError, AttributeError, IndexError) as err:  # the last where there is no file
        raise InputError(f"{needed}, it does not open: {err}") from err
    if lacking or len(dataset) == 0:
        raise InputError(f"{needed}, it lacks {', '.join(lacking) or 'contexts'}")
    length = getattr(dataset.features["input_ids"], "length", None)
    if (info["rows"], info["min_tokens"]) != (len(dataset), length):
        said = f"{info['rows']} contexts of {info['min_tokens']} tokens needed by {path / INFO_FILE}"
        raise InputError(f"{said}, there are {len(dataset)} of {length}")
    return dataset, info


def read_contexts(dataset, rows, batch_size, num_tokens=0):
    """Batches of contexts: int64 ids [<= batch_size, T] of the dataset's `rows` in their order.

    T is the first `num_tokens` tokens of each context, 0: all of them.
    """
    torch_view = dataset.with_format("torch", columns=["input_ids"])
    for start in range(0, len(rows), batch_size):
        ids_BT = torch_view[[int(row) for row in rows[start : start + batch_size]]]["input_ids"].long()
        yield ids_BT[:, :num_tokens] if num_tokens else ids_BT


def load_tokenizer(dataset_path, info):
    """The tokenizer that made a dataset: its copy in the folder, or by name where there is none."""
    from sae import models

    copy = Path(dataset_path) / TOKENIZER
    return models.load_tokenizer(str(copy) if copy.is_dir() else info["tokenizer_name"])


def tokenizer_fingerprint(tokenizer_json):
    """Of which ids stand for what: the same for every spelling of one tokenizer's tokenizer.json."""
    spec = json.loads(tokenizer_json)
    vocab, merges = spec["model"]["vocab"], spec["model"].get("merges") or []
    if isinstance(vocab, list):  # Unigram: tokens with their scores
        vocab = {token: number for number, (token, _score) in enumerate(vocab)}
    vocab = vocab | {token["content"]: token["id"] for token in spec["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    digest = hashlib.sha256(json.dumps([sorted(vocab.items()), merges]).encode())
    return f"vocabulary-{digest.hexdigest()[:16]}"


def check_tokenizer(info, model_name, allow_other=False):
    """Refuse a dataset that another tokenizer has made than the model's, unless `allow_other`."""
    from sae import models

    made_with = info.get("tokenizer_fingerprint", "")
    # Version 0.1 took the fingerprint of the file, which another version of tokenizers writes otherwise.
    if allow_other or not made_with.startswith("vocabulary-"):
        return
    try:
        tokenizer = models.load_tokenizer(model_name)
    except InputError:
        print(f"{model_name} has no tokenizer to compare with that of the dataset ({info['tokenizer_name']})")
        return
    came = tokenizer_fingerprint(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else made_with
    if came != made_with:
        raise InputError(
            f"a dataset made with the tokenizer of {model_name} ({came}) needed, this one was made with "
            f"{info['tokenizer_name']} ({made_with}); --allow_other_tokenizer goes on all the same"
        )


def write_arrow(path, batches, length):
    """Write batches of (ids [N, length] int32, documents [N] int64) as one file.

    Returns the number of rows, their fingerprint (the same however they are batched), and the largest id.
    """
    import pyarrow as pa

    schema = pa.schema([("input_ids", pa.list_(pa.int32(), length)), ("document", pa.int64())])
    hashes, rows, largest = (hashlib.sha256(), hashlib.sha256()), 0, 0
    with artifacts.atomic_write(path) as handle, pa.ipc.new_stream(handle, schema) as writer:
        for ids_NT, documents_N in batches:
            ids = pa.FixedSizeListArray.from_arrays(pa.array(ids_NT.reshape(-1)), length)
            writer.write_batch(pa.record_batch([ids, pa.array(documents_N)], schema=schema))
            hashes[0].update(ids_NT)
            hashes[1].update(documents_N)
            rows, largest = rows + len(ids_NT), max(largest, int(ids_NT.max()))
    return rows, hashlib.sha256(hashes[0].digest() + hashes[1].digest()).hexdigest(), largest


def file_name(plan, number):
    return f"data-{number:05d}-of-{plan['num_files']:05d}.arrow"


def write_info(folder, plan, files, counts):
    """Describe the Arrow files in `folder`, so that they are a dataset. files: (fingerprint, largest id)."""
    columns = plan["text_field"]
    arguments = {key: plan[key] for key in ("data_dir", "dataset_config", "split")}
    arguments["text_field"] = columns[0] if columns and len(columns) == 1 else columns
    info = {
        **{key: plan[key] for key in ("tokenizer_name", "tokenizer_fingerprint", "vocab_size")},
        "max_token_id": max(largest for _fingerprint, largest in files),
        "dataset_name": plan["dataset_name"],
        "dataset_arguments": arguments,
        **{key: plan[key] for key in ("min_tokens", "chunk_documents", "add_bos", "seed")},
        **{key: plan[key] for key in ("num_files", "num_samples_per_file", "num_processes")},
        "rows": plan["num_files"] * plan["num_samples_per_file"],
        **counts,
        "fingerprint": hashlib.sha256("".join(each for each, _largest in files).encode()).hexdigest()[:16],
        "suite_version": plan["suite_version"],
    }
    ids = {"feature": {"dtype": "int32", "_type": "Value"}, "length": plan["min_tokens"], "_type": "List"}
    features = {"input_ids": ids, "document": {"dtype": "int64", "_type": "Value"}}
    artifacts.save_json(folder / "dataset_info.json", {"features": features})
    state = {
        "_data_files": [{"filename": file_name(plan, number)} for number in range(plan["num_files"])],
        "_fingerprint": info["fingerprint"],
        "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
        "_output_all_columns": False, "_split": None,
    }  # fmt: skip
    artifacts.save_json(folder / "state.json", state)
    artifacts.save_json(folder / INFO_FILE, info)
