"""The script, on the real SmolLM2 against a brute force of plain hooks, and on a tiny Llama for the rest."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, assert_refused, run_script, write_dataset
from servers import meeting_port

import generate_interpretation_samples as script
from sae import InputError
from sae.activations import activations_at
from sae.autoencoder import Autoencoder, load_checkpoint, save_checkpoint
from sae.models import fast_dtype, load_model, model_fingerprint
from sae.processes import Processes
from sae.samples import RANDOM, SPREAD, TOP, load_samples
from sae.samples.run import check_target, prepare
from sae.tokens import open_dataset, read_contexts

ALONE = Processes(0, 1, None)
SKIP, LENGTH, FEATURES = 2, 48, 96


def write_checkpoint(path, dataset_path, model_name, layer, width, autoencoder, **changes):
    config = {
        "act_vec_size": width, "dict_vec_size": len(autoencoder.b_enc), "layer_id": layer,
        "layer_type": "mlp_activations", "hookpoint": f"model.layers.{layer}.mlp.act_fn",
        "model_name": model_name, "num_tokens": LENGTH, "skip_positions": SKIP, "normalize_dataset": True,
        "seed": 11, "dataset_fingerprint": open_dataset(dataset_path)[1]["fingerprint"],
    }  # fmt: skip
    save_checkpoint(path, config | changes, autoencoder, torch.zeros(len(autoencoder.b_enc)))
    return str(path)


def plain_activations(model_name, layer, ids_NT):
    """The module's outputs by a hook of the ten-line kind, float32: [N, T, D]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[: layer + 1]  # what lies behind does not reach the hookpoint
    seen = []
    model.model.layers[layer].mlp.act_fn.register_forward_hook(lambda _mod, _in, out: seen.append(out))
    with torch.no_grad():
        for ids_BT in ids_NT.split(30):
            model.model(ids_BT, use_cache=False)
    return torch.cat(seen)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, smollm2, small_dataset, stdlib_contexts):
    """A small autoencoder trained on layer 1 of SmolLM2, and the activations [240, LENGTH, D] it saw."""
    acts_NTD = plain_activations(smollm2, 1, torch.tensor(stdlib_contexts[0])[:, :LENGTH])
    rng = torch.Generator().manual_seed(0)
    x_ND = acts_NTD[:, SKIP:].flatten(0, 1)
    autoencoder = Autoencoder(1536, FEATURES, normalize=True, rng=rng)
    autoencoder.b_dec.data = (x_ND[:4000] * autoencoder.scale(x_ND[:4000])).median(0).values
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=3e-3)
    for _ in range(60):
        batch_ND = x_ND[torch.randint(0, len(x_ND), (256,), generator=rng)]
        batch_ND = batch_ND * autoencoder.scale(batch_ND)
        f_NF = autoencoder.encode(batch_ND)
        loss = ((autoencoder.decode(f_NF) - batch_ND) ** 2).sum(1).mean() + 2 * f_NF.sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("trained") / "60.pt"
    return write_checkpoint(path, small_dataset, smollm2, 1, 1536, autoencoder), acts_NTD


def test_on_smollm2_equals_brute_force(tmp_path, trained, small_dataset, stdlib_contexts):
    (path, acts_NTD), documents_N = trained, torch.tensor(stdlib_contexts[1])
    result = run_script(
        "generate_interpretation_samples.py", 200, "--dataset_path", small_dataset,
        "--autoencoder_path", path, "--save_path", tmp_path / "s.pt", "--dtype_llm", "float32",
        "--log_freq_lower", -2.5, "--log_freq_upper", -0.05, "--num_top", 10, "--num_spread", 8,
        "--num_random", 6,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path)) == ["s.png", "s.pt"]
    samples, autoencoder = load_samples(tmp_path / "s.pt"), load_checkpoint(path).autoencoder
    f_NTF = autoencoder.features(acts_NTD[:, SKIP:].flatten(0, 1)).unflatten(0, (240, LENGTH - SKIP))
    f_NTF[torch.randperm(240, generator=torch.Generator().manual_seed(0))[200:]] = 0  # not looked at

    share_F = (f_NTF > 0).double().sum((0, 1)) / (200 * (LENGTH - SKIP))
    torch.testing.assert_close(samples.log10_frequency, share_F.log10().float(), rtol=0, atol=1e-6)
    assert samples.num_tokens_seen == 200 * (LENGTH - SKIP)
    inside = (share_F.log10() > -2.5) & (share_F.log10() < -0.05)
    assert samples.features.tolist() == inside.nonzero()[:, 0].tolist()
    assert 10 < len(samples.features) <= FEATURES
    torch.testing.assert_close(samples.max_activation, f_NTF.amax((0, 1))[inside])

    rows, activations, kind = samples.rows, samples.activations, samples.kind
    assert activations.shape == (len(rows), 24, LENGTH) and activations.dtype == torch.float16
    assert kind[0].tolist() == [TOP] * 10 + [SPREAD] * 8 + [RANDOM] * 6
    for slot, feature in enumerate(samples.features.tolist()):
        value_N = f_NTF[:, :, feature].amax(1)
        drawn = documents_N[rows[slot, 18:][rows[slot, 18:] >= 0]]
        others = [d for d in documents_N.unique() if d not in drawn]
        best = torch.stack([value_N[documents_N == d].max() for d in others])
        top = rows[slot, :10][rows[slot, :10] >= 0]
        torch.testing.assert_close(value_N[top], best[best > 0].sort(descending=True).values[:10])
        kept = rows[slot][rows[slot] >= 0]
        assert len(documents_N[kept].unique()) == len(kept)
        spread = rows[slot, 10:18][rows[slot, 10:18] >= 0]
        assert value_N[spread].tolist() == sorted(value_N[spread].tolist(), reverse=True)
        below = (value_N.max() / value_N[spread]).log2()
        assert (below <= 4.13).all()  # 8 steps, two to a halving; an eighth of one more for rounding
        for column, row in enumerate(rows[slot].tolist()):
            wanted = f_NTF[row, :, feature].half() if row >= 0 else torch.zeros(LENGTH - SKIP).half()
            torch.testing.assert_close(activations[slot, column, SKIP:], wanted, rtol=2e-3, atol=1e-4)
            assert not activations[slot, column, :SKIP].any()

    assert samples.hard_rows.shape == (len(rows), 12) and (samples.hard_rows >= 0).any()
    for slot, feature in enumerate(samples.features.tolist()):
        hard = samples.hard_rows[slot][samples.hard_rows[slot] >= 0]
        assert not f_NTF[hard, :, feature].any()  # silent here, though among the strongest of another one
        assert torch.isin(hard, rows[:, :6]).all()
        assert not torch.isin(documents_N[hard], documents_N[rows[slot][rows[slot] >= 0]]).any()

    model = load_model(load_checkpoint(path).config["model_name"], dtype="float32")
    writes_FD = autoencoder.W_dec[samples.features] @ model.model.layers[1].mlp.down_proj.weight.T
    logits_FV = (writes_FD * model.model.norm.weight) @ model.lm_head.weight.T
    assert samples.promoted.shape == samples.suppressed.shape == (len(rows), 10)
    torch.testing.assert_close(samples.promoted_logits, logits_FV.topk(10).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        samples.suppressed_logits, logits_FV.topk(10, largest=False).values, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        logits_FV.gather(1, samples.promoted), samples.promoted_logits, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        logits_FV.gather(1, samples.suppressed), samples.suppressed_logits, rtol=1e-4, atol=1e-4
    )

    assert samples.config["seed"] == 11 and samples.config["samples_seed"] == 0
    own = {
        "num_samples": 200, "log_freq_lower": -2.5, "log_freq_upper": -0.05, "num_top": 10, "num_spread": 8,
        "num_random": 6, "batch_size": 16, "autoencoder_path": path, "samples_dtype_llm": "float32",
    }  # fmt: skip
    assert own.items() <= samples.config.items()
    line = result.stdout.splitlines()[-1]
    dead, rare = int((share_F == 0).sum()), int(((share_F > 0) & (share_F.log10() <= -2.5)).sum())
    assert line.startswith(
        f"{len(rows)} features in the band, {rare} too rare, {FEATURES - len(rows) - rare - dead}"
    )
    assert f"{dead} dead; written to {tmp_path / 's.pt'}" in line and "contexts/s" in line
    assert f", {len(rows[rows >= 0].unique())} contexts looked at twice" in line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoding_follows_the_llms_dtype(dtype, tmp_path, trained, small_dataset):
    """What bfloat16 gives, where the machine is fast at it, is nearly what float32 gives."""
    run = prepare(
        ALONE, 64, small_dataset, trained[0], tmp_path / "s.pt", None, None, None, -0.1, -2.0, 16, dtype
    )
    fast = fast_dtype("cpu") if dtype == "bfloat16" else torch.float32
    assert run.checkpoint.autoencoder.W_enc.dtype == fast
    looked = run.look(torch.arange(64), torch.arange(64), "", ALONE, lambda: False, str)
    got_NTF = torch.cat([f_bTF for _, f_bTF in looked])
    module = run.model.get_submodule(run.hookpoint)
    acts = [
        activations_at(run.model, module, ids) for ids in read_contexts(run.dataset, range(64), 16, LENGTH)
    ]
    strict = load_checkpoint(trained[0]).autoencoder
    want_NTF = strict.features(torch.cat(acts)[:, SKIP:].flatten(0, 1)).view_as(got_NTF)
    assert got_NTF.dtype == torch.float32
    others = ((got_NTF > 0) != (want_NTF > 0)).sum() / (want_NTF > 0).sum()
    off = (got_NTF.amax((0, 1)) / want_NTF.amax((0, 1)) - 1).abs().nanmedian()
    assert max(others, off) < (1e-5 if fast == torch.float32 else 0.005)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_llama):
    """Flags that name a dataset of 90 random contexts of 64 tokens and an autoencoder on the tiny Llama."""
    folder, rng = tmp_path_factory.mktemp("tiny"), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (90, 64), generator=rng).tolist()
    dataset = write_dataset(folder / "tokens", ids, [n // 2 for n in range(90)], tiny_llama)
    autoencoder = Autoencoder(48, 64, normalize=True, rng=rng)
    autoencoder.b_enc.data -= 1
    path = write_checkpoint(folder / "autoencoder.pt", dataset, tiny_llama, 1, 48, autoencoder)
    return {"dataset_path": dataset, "autoencoder_path": path}


def run_main(monkeypatch, flags, num_samples=60, stopping=lambda: False):
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["generate_interpretation_samples.py", str(num_samples), *words])
    return script.main(script.parse_args()[1], stopping)


def test_same_flags_same_bytes_and_batches_do_not_matter(tmp_path, monkeypatch, tiny, capsys):
    def samples(name, **flags):
        run_main(monkeypatch, tiny | {"save_path": tmp_path / name} | flags)
        return load_samples(tmp_path / name)

    first, batched = samples("a.pt"), samples("b.pt", batch_size=7)
    samples("c.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "c.pt").read_bytes()
    for field in ("rows", "activations", "features", "log10_frequency"):
        assert torch.equal(getattr(first, field), getattr(batched, field)), field
    assert not torch.equal(first.rows, samples("d.pt", seed=1).rows) and "few" not in capsys.readouterr().out
    (tmp_path / "e.png").mkdir()
    samples("e.pt", log_freq_lower=-1.02, log_freq_upper=-1)
    said = "few features in the band: of 64 features that fire --log_freq_lower -2 would hold "
    out, err = capsys.readouterr()
    assert said in out and f"no picture {tmp_path / 'e.png'}" in err


def prepare_tiny(tiny, tmp_path, here=ALONE, **flags):
    flags = {"target_model_device": None, "autoencoder_device": None} | flags
    return prepare(
        here, 60, **tiny, save_path=tmp_path / "s.pt", target_model_name=None, log_freq_upper=-0.1,
        log_freq_lower=-2.0, batch_size=16, dtype_llm="auto", **flags,
    )  # fmt: skip


def test_promoted_tokens_are_of_the_vocabulary_for_any_number_of_features(tmp_path, tiny):
    run = prepare_tiny(tiny, tmp_path)
    run = run._replace(info=run.info | {"vocab_size": 40})  # and the model has embeddings for more
    for values in run._promoted(torch.arange(64).repeat(5)).values():
        assert len(values) == 320 and torch.equal(values[:64], values[-64:]) and values.max() < 40


@pytest.mark.parametrize(("before", "done"), [(0, "16 of 60 .*one pass"), (6, r"48 of \d+ .*second look")])
def test_a_stop_says_how_far_it_came(tmp_path, monkeypatch, tiny, before, done):
    asked = iter(range(99))
    with pytest.raises(KeyboardInterrupt, match=done):
        run_main(monkeypatch, tiny | {"save_path": tmp_path / "s.pt"}, stopping=lambda: next(asked) >= before)
    assert os.listdir(tmp_path) == []


def test_no_plot_when_not_wanted(tmp_path, tiny):
    flags = [word for name, value in tiny.items() for word in (f"--{name}", value)]
    result = run_script(
        "generate_interpretation_samples.py", 20, *flags, "--no-save_plot", "--save_path", tmp_path / "s.pt"
    )
    assert result.returncode == 0 and os.listdir(tmp_path) == ["s.pt"], result.stderr


def test_empty_band_is_refused(tmp_path, tiny):
    flags = [word for name, value in tiny.items() for word in (f"--{name}", value)]
    result = run_script(
        "generate_interpretation_samples.py", 60, *flags, "--save_path", tmp_path / "s.pt",
        "--log_freq_lower", -9, "--log_freq_upper", -8,
    )  # fmt: skip
    assert_refused(result, "-9 and -8", "from -", "alive")
    assert os.listdir(tmp_path) == []


def test_sigterm_leaves_nothing_behind(tmp_path, tiny):
    flags = [word for name, value in tiny.items() for word in (f"--{name}", value)]
    command = [sys.executable, ROOT / "generate_interpretation_samples.py", "90", *flags, "--save_path"]
    process = subprocess.Popen(
        [*command, tmp_path / "s.pt", "--batch_size", "1"], stderr=subprocess.PIPE, text=True
    )
    caught = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:  # until its handler is there
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
        )
        if int(status["SigCgt"], 16) & caught:
            process.terminate()
            break
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "nothing was written" in errors, errors
    assert "Traceback" not in errors and os.listdir(tmp_path) == []


def test_what_cannot_be_used_is_refused(tmp_path, monkeypatch, tiny, tiny_llama, smollm2, small_dataset):
    checkpoint, autoencoder = Path(tiny["autoencoder_path"]), Autoencoder(48, 64, normalize=True)

    def other(name, **changes):
        return write_checkpoint(
            tmp_path / name,
            tiny["dataset_path"],
            changes.pop("model_name", tiny_llama),
            1,
            48,
            autoencoder,
            **changes,
        )

    (tmp_path / "short.pt").write_bytes(checkpoint.read_bytes()[:3000])
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"config": {}}))
    fingerprint = load_checkpoint(checkpoint).config["dataset_fingerprint"]
    other_words = shutil.copytree(tiny["dataset_path"], tmp_path / "other words")
    info = json.loads((other_words / "tokenized_dataset.json").read_text())
    info["tokenizer_fingerprint"] = "vocabulary-of-others"
    (other_words / "tokenized_dataset.json").write_text(json.dumps(info))
    cases = [
        ({"log_freq_upper": -2, "log_freq_lower": -1}, "--log_freq_upper above .* got -2 and -1"),
        ({"log_freq_upper": -1, "log_freq_lower": -1}, "--log_freq_upper above .* got -1 and -1"),
        ({"dataset_path": tmp_path / "none"}, "tokenised dataset needed .*no such folder"),
        (
            {"dataset_path": small_dataset},
            f"tokens of .* fingerprint {fingerprint}, but --dataset_path {small_dataset} .tokens of ",
        ),
        ({"autoencoder_path": tmp_path / "none.pt"}, "no such file"),
        ({"autoencoder_path": tmp_path / "short.pt"}, "truncated"),
        ({"autoencoder_path": tmp_path / "pickle.pt"}, "truncated or no torch file"),
        ({"target_model_name": smollm2}, f"{tiny_llama}.* needed, got {smollm2}"),
        (
            {"autoencoder_path": other("wide.pt", model_name=smollm2)},
            f"{smollm2}, act_vec_size 48.* is 1536 wide",
        ),
        ({"autoencoder_path": other("deep.pt", hookpoint="model.layers.7.mlp")}, "no module of the model"),
        ({"target_model_device": "cuda:77"}, "--target_model_device .*cuda:77"),
        ({"autoencoder_device": "abacus"}, "--autoencoder_device .*abacus"),
        ({"save_path": tmp_path}, "--save_path"),
        ({"save_path": tmp_path / "s.png"}, "--save_path needs the name of a file .*s.png"),
        ({"dataset_path": other_words}, "tokenizer of .* needed, .*vocabulary-of-others"),
        ({"save_path": checkpoint}, "--save_path needs a new file or an interpretation samples file"),
    ]
    for flags, message in cases:
        with pytest.raises(InputError, match=message):
            run_main(monkeypatch, tiny | {"save_path": tmp_path / "s.pt"} | flags)
    with pytest.raises(InputError, match=r"at most 90 .*tokens\) needed, got 91"):
        run_main(monkeypatch, tiny | {"save_path": tmp_path / "s.pt"}, num_samples=91)
    for device in ("target_model_device", "autoencoder_device"):
        with pytest.raises(InputError, match="one process needed to choose devices, got 2"):
            prepare_tiny(tiny, tmp_path, Processes(0, 2, "cpu"), **{device: "cpu"})
    assert not (tmp_path / "s.pt").exists()


def test_the_checkpoints_model_is_known_by_its_fingerprint(tmp_path, tiny_llama, small_dataset, capsys):
    info = open_dataset(small_dataset)[1]
    moved = str(shutil.copytree(tiny_llama, tmp_path / "0e3a5b"))
    config = {"model_name": tiny_llama, "layer_id": 1, "act_vec_size": 48}
    config["hookpoint"] = "model.layers.1.mlp.act_fn"
    known = config | {"model_fingerprint": model_fingerprint(tiny_llama)}
    check_target(known, moved, info)
    check_target(known | {"num_tokens": 5000}, moved, info)
    assert "contexts of at most 4096 tokens" in capsys.readouterr().err
    with pytest.raises(InputError, match="token ids below 49152 needed"):
        check_target(known, moved, info | {"vocab_size": 49153})
    with pytest.raises(InputError, match=f"{tiny_llama}.* needed, got {moved}"):
        check_target(config, moved, info)  # of version 0.1: the last part of the name decides
    (tmp_path / "same").symlink_to(tiny_llama)
    check_target(config, str(tmp_path / "same"), info)  # or where it lies
    namesake = tmp_path / "elsewhere" / Path(tiny_llama).name
    check_target(config, str(shutil.copytree(moved, namesake)), info)
    with pytest.raises(InputError, match=f"{tiny_llama}.* needed, got {tiny_llama}"):
        check_target(known | {"model_fingerprint": "of other weights"}, tiny_llama, info)


@pytest.mark.parametrize(
    "flag, value", [("--log_freq_upper", "0"), ("--log_freq_lower", "nan"), ("--num_top", "0")]
)
def test_bad_values_are_refused(flag, value):
    assert_refused(run_script("generate_interpretation_samples.py", 5, flag, value), flag, value)


def launch(count, *args, **options):
    """The script on `count` processes, as the launcher of deepspeed starts them, in a group of its own."""
    port = str(meeting_port())
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [
        launcher,
        "--num_gpus",
        count,
        "--master_port",
        port,
        ROOT / "generate_interpretation_samples.py",
    ]
    return subprocess.Popen(
        [*map(str, command), *map(str, args), "--num_gpus", str(count)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=options.get("cwd"),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def finish(process, timeout=240):
    """(status, the lines of our own that it printed), and nothing of it is left."""
    try:
        said = process.communicate(timeout=timeout)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert 'generate_interpretation_samples.py", line' not in said, said  # a traceback of ours
    ours = ("generate_interpretation_samples.py: error", "stopped", "features in the band,")
    return process.returncode, [line for line in said.splitlines() if any(word in line for word in ours)]


def words(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def test_two_processes_write_the_same_file(tmp_path, tiny):
    # 41 contexts in batches of 4: the last round has a batch for one process alone, of one context.
    flags = [41, *words(tiny), "--batch_size", 4, "--no-save_plot", "--num_top", 3, "--num_spread", 2]
    status, lines = finish(launch(2, *flags, "--save_path", tmp_path / "two.pt"))
    assert status == 0 and len(lines) == 1, lines
    one = run_script(
        "generate_interpretation_samples.py", *flags, "--save_path", tmp_path / "one.pt",
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    assert lines[0].split(";")[0] == one.stdout.splitlines()[-1].split(";")[0]


def test_a_refusal_on_two_processes_is_one_line(tmp_path, tiny):
    flags = [60, *words(tiny), "--save_path", tmp_path / "s.pt"]
    status, lines = finish(launch(2, *flags, "--log_freq_lower", -9, "--log_freq_upper", -8))
    assert status == 2 and len(lines) == 1 and "-9 and -8 needed, there is none" in lines[0], lines
    assert_refused(run_script("generate_interpretation_samples.py", *flags, "--num_gpus", 2), "deepspeed")
    assert os.listdir(tmp_path) == []


def in_the_middle(launcher, dataset_path, count):
    """Pids of the script's processes, by rank, once all have opened the dataset (and joined before)."""
    while launcher.poll() is None:
        by_rank = {}
        with contextlib.suppress(psutil.Error, OSError):
            for child in psutil.Process(launcher.pid).children(recursive=True):
                rank = [word for word in child.cmdline() if word.startswith("--local_rank=")]
                if rank and dataset_path in Path(f"/proc/{child.pid}/maps").read_text():
                    by_rank[rank[0]] = child.pid
        if len(by_rank) == count:
            return [by_rank[rank] for rank in sorted(by_rank)]
        time.sleep(0.01)
    raise AssertionError(launcher.communicate()[0])


@pytest.mark.parametrize("how", ["kill 0", "kill 1", "Ctrl-C"])
def test_a_process_that_dies_and_a_stop_end_all(tmp_path, tiny, how):
    flags = [90, *words(tiny), "--batch_size", 1, "--save_path", tmp_path / "s.pt"]
    process = launch(2, *flags)
    pids = in_the_middle(process, tiny["dataset_path"], 2)
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(pids[int(how[-1])], signal.SIGKILL)
    status, lines = finish(process)
    assert status and len(lines) == 1 and os.listdir(tmp_path) == [], lines
    assert ("stopped" if how == "Ctrl-C" else "another one has ended") in lines[0]
