"""Several settings side by side on one stream."""

import json

import pytest
import torch
from conftest import assert_refused, run_script
from test_train_script import SCRIPT, contents, flags, start, wait_for

from sae import InputError
from sae.training import sweep
from sae.training.folder import RunFolder

SMALL = {"num_batches": 90, "batches_between_ckpt": 30, "neuron_resampling_interval": 30}
SWEEP = {"dict_vec_size": "96 64"}
NAMES = ["dict_vec_size_96", "dict_vec_size_64"]


def words(*args, **more):
    """The flags of a small sweep, several values as words of their own."""
    return [part for word in flags(*args, **(SMALL | SWEEP | more)) for part in word.split(" ")]


def train(*args, **more):
    return run_script(SCRIPT, *words(*args, **more))


@pytest.fixture(scope="module")
def whole_sweep(small_dataset, tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "whole"
    result = train(small_dataset, tiny_llama, folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_each_folder_is_that_of_a_single_run(whole_sweep, small_dataset, tiny_llama, tmp_path):
    folder, result = whole_sweep
    assert {path.name for path in folder.iterdir()} == {*NAMES, "sweep.jsonl", "sweep.png"}
    single = run_script(SCRIPT, *flags(small_dataset, tiny_llama, tmp_path / "one",
                                       dict_vec_size=64, **SMALL))  # fmt: skip
    assert single.returncode == 0, single.stderr
    assert contents(tmp_path / "one") == contents(folder / NAMES[1])
    assert {path.name for path in (folder / NAMES[1]).rglob("*.png")} == {
        "30.png", "60.png", "90.png", "loss_curves.png",
    }  # fmt: skip
    assert all(name in result.stdout for name in NAMES)
    assert "tokens/s" in result.stdout.splitlines()[-1]


def test_sweep_jsonl_has_the_figures_of_each_checkpoint(whole_sweep):
    folder = whole_sweep[0]
    lines = [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]
    assert [(line["batch"], line["folder"]) for line in lines] == [
        (batch, name) for batch in (30, 60, 90) for name in NAMES
    ]
    last = lines[-1]
    assert (last["l1_coefficient"], last["dict_vec_size"]) == (1, 64)
    own = [json.loads(line) for line in (folder / NAMES[1] / "metrics.jsonl").read_text().splitlines()][-1]
    assert all(last[key] == own[key] for key in sweep.FIGURES)


def test_a_sweep_that_was_killed_ends_with_the_same_bytes(whole_sweep, small_dataset, tiny_llama, tmp_path):
    killed_and_resumed(whole_sweep[0], small_dataset, tiny_llama, tmp_path / "run")


@pytest.mark.long
def test_a_sweep_on_the_real_model_that_was_killed(small_dataset, smollm2, tmp_path):
    result = train(small_dataset, smollm2, tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    killed_and_resumed(tmp_path / "whole", small_dataset, smollm2, tmp_path / "run")


def killed_and_resumed(whole, dataset, model, folder):
    """kill -9 where the first folder is a checkpoint ahead, and where the second has begun its own."""
    kills, apart = 0, 0
    for reached in (
        lambda: _batch(folder / NAMES[0]) == 30,
        (folder / NAMES[1] / "60.pt").exists,
    ):
        process = start(command=words(dataset, model, folder, resume=""))
        wait_for(reached, process)
        kills += process.poll() is None
        process.kill()
        process.communicate()
        apart += len({_batch(folder / name) for name in NAMES}) > 1
    (folder / ".sweep.png.abc.partial").touch()
    result = train(dataset, model, folder, resume="")
    assert result.returncode == 0, result.stderr
    assert not list(folder.rglob(".*.partial"))
    assert kills == 2 and apart >= 1, (kills, apart)
    for name in NAMES:
        assert contents(folder / name) == contents(whole / name)
    assert (folder / "sweep.jsonl").read_text() == (whole / "sweep.jsonl").read_text()
    assert "nothing to do" in train(dataset, model, folder, resume="").stdout


def _batch(folder):
    resume = folder / "resume.pt"
    return torch.load(resume, weights_only=True)["trainer"]["batch"] if resume.exists() else None


def test_other_values_or_a_single_run_do_not_fit_into_the_folder(whole_sweep, small_dataset, tiny_llama):
    folder = whole_sweep[0]
    assert_refused(train(small_dataset, tiny_llama, folder), "--resume", "holds a run")
    for names in ([""], [NAMES[0], "dict_vec_size_32"]):
        with pytest.raises(InputError, match=f"of its own needed for .*; {folder} holds .*{NAMES[1]}"):
            sweep.check_place(folder, names)
    sweep.check_place(folder, NAMES)
    with pytest.raises(InputError, match=f"needed for {NAMES[1]}, .* holds a single run"):
        sweep.check_place(folder / NAMES[0], NAMES)


def test_values_are_combined_in_order_and_one_value_is_a_plain_run():
    one = {
        "l1_coefficient": 1.0,
        "learning_rate": [1e-4],
        "dict_vec_size": None,
        "k": None,
        "target_l0": None,
        "architecture": "relu",
    }
    assert list(sweep.combinations(one)) == [""]
    assert sweep.combinations(one)[""]["learning_rate"] == 1e-4
    found = sweep.combinations(
        one | {"architecture": "topk", "k": [16, 32], "learning_rate": [1.234e-3, 2e-4]}
    )
    assert list(found) == [
        "learning_rate_0.001234-k_16", "learning_rate_0.001234-k_32",
        "learning_rate_0.0002-k_16", "learning_rate_0.0002-k_32",
    ]  # fmt: skip
    assert found["learning_rate_0.0002-k_16"]["k"] == 16
    with pytest.raises(InputError, match="--k needs values that differ, got 16 16"):
        sweep.combinations(one | {"k": [16, 16]})
    with pytest.raises(InputError, match="relu or jumprelu, got topk"):
        sweep.combinations(one | {"l1_coefficient": [1.0, 2.0], "architecture": "topk"})


def test_a_layer_behind_several_values_is_found(small_dataset, tiny_llama, tmp_path):
    given = words(small_dataset, tiny_llama, tmp_path / "run", num_batches=2, dry_run="")
    result = run_script(SCRIPT, *given[2:], *given[:2])
    assert result.returncode == 0, result.stderr
    assert "minutes at" in result.stdout


def test_a_second_run_in_the_same_folder_is_refused(small_dataset, tiny_llama, tmp_path):
    """The first goes on; when it is killed, its lock is gone with it."""
    process = start(small_dataset, tiny_llama, tmp_path / "run", num_batches=100_000)
    wait_for((tmp_path / "run" / "resume.pt").exists, process)
    second = run_script(
        SCRIPT, *flags(small_dataset, tiny_llama, tmp_path / "run", num_batches=100_000, resume="")
    )
    assert_refused(second, "another run is writing", tmp_path / "run")
    assert process.poll() is None
    process.kill()
    process.communicate()
    config = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["config"]
    RunFolder(tmp_path / "run", config, resume=True)
