"""A run from its flags on, within the tests' process."""

import sys

import torch
from test_train_script import SCRIPT, flags

from sae import models
from sae.models import load_tokenizer
from sae.training import folder, loop, plan, prepare, stream
from sae.training.probe import CLASSES, token_classes
from train_autoencoder_from_tokens import parse_args


def test_what_is_judged_and_saved_and_what_a_resumed_run_takes_over(
    small_dataset, stdlib_contexts, tiny_llama, tmp_path, monkeypatch
):
    """Short contexts without their beginnings; a state is due at every line of the log."""
    more = {"num_batches": 60, "num_tokens": 20, "skip_positions": 4, "batches_between_ckpt": 0}
    words = flags(small_dataset, tiny_llama, tmp_path, **more)
    monkeypatch.setattr(sys, "argv", [SCRIPT, *words])
    given, asked = vars(parse_args()[1]) | {"num_batches_preload": None}, []
    monkeypatch.setattr(models, "check_positions", lambda _skeleton, tokens: asked.append(tokens))
    monkeypatch.setattr(plan, "DEFAULT_PRELOAD", 7)
    monkeypatch.setattr(folder, "RESUME_SECONDS", -1)
    run = prepare(given)
    model, module = run.open_llm()
    (ids, documents), held_out = stdlib_contexts, run.held_out_rows.tolist()
    judge, tokenizer = run.judge(model, module), load_tokenizer(tiny_llama)
    for row, labels_T in zip(held_out, judge._labels_MT.tolist(), strict=True):
        first = documents.index(documents[row])
        classes_T = token_classes(tokenizer, ids[first] + ids[first + 1])[64 * (row - first) :][:20]
        assert [label % (len(CLASSES) + 1) for label in labels_T] == (classes_T % (len(CLASSES) + 1)).tolist()
    assert judge._skip == 4 and asked == [20] and held_out != sorted(held_out)

    trainers = run.trainers()
    for _ in zip(range(50), loop(run, model, module, trainers, stream(run, model, module, 0)), strict=False):
        pass
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["trainer"]["batch"] == 50
    assert run.wrote(50, 4.0).endswith("; 4 s, 1600 tokens/s")
    run.folders[0]._handle.close()
    monkeypatch.setattr(plan, "DEFAULT_PRELOAD", 9)  # as if there were more memory now
    assert prepare(given | {"resume": True}).config["num_batches_preload"] == 7
