"""Each architecture as it trains on activations of the real SmolLM2: schedules, targets, going on."""

import json

import pytest
import torch

from sae import InputError
from sae.activations import activation_rows, find_hookpoint
from sae.autoencoder import ARCHITECTURES, load_checkpoint, save_checkpoint
from sae.models import load_model
from sae.training import trainer
from sae.training.buffer import ShuffleBuffer
from sae.training.config import of_architecture
from sae.training.folder import RunFolder
from sae.training.trainer import Resampling, new_trainer, train

FLAGS = {
    "architecture": "relu", "k": None, "target_l0": None, "scale_dataset": None, "normalize_dataset": False,
    "lr_warmup_batches": None, "lr_decay_batches": None, "l1_warmup_batches": 0,
    "neuron_resampling_method": None,
}  # fmt: skip


def config_of(architecture, num_batches, batch_size=128, **more):
    flags = FLAGS | {"architecture": architecture} | more
    return flags | of_architecture(flags, num_batches, 256) | {
        "seed": 0, "learning_rate": 1e-3, "l1_coefficient": 1.0, "act_vec_size": 1536, "dict_vec_size": 256,
        "batch_size_autoencoder": batch_size, "hookpoint": "model.layers.2.mlp.act_fn", "model_name": "m",
        "layer_id": 2, "layer_type": "mlp_activations",
    }  # fmt: skip


@pytest.fixture(scope="module")
def real_rows(smollm2, stdlib_contexts):
    """Activations of real code [3840, 1536]."""
    model = load_model(smollm2, "cpu", "float32")
    module, _ = find_hookpoint(model, "model.layers.{}.mlp.act_fn", 2)
    ids_BT = torch.tensor(stdlib_contexts[0][:60])
    return torch.cat(list(activation_rows(model, module, ids_BT.split(20))))


def buffer_of(rows_ND, num_batches, first=0, batch_size=128, capacity=10):
    """Epoch after epoch, from the block of batch `first` on."""
    start = first // capacity * capacity * batch_size % len(rows_ND)
    chunks = [rows_ND[start:], *[rows_ND] * (num_batches * batch_size // len(rows_ND) + 1)]
    return ShuffleBuffer(iter(chunks), batch_size, num_batches, capacity, 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_that_goes_on_has_the_same_bits(architecture, real_rows, tmp_path, monkeypatch):
    """Stopped after 17 of 40 batches, and opened by another process's RunFolder: the same checkpoint."""
    monkeypatch.setattr(trainer, "AUX_WINDOW", 1)
    plan = Resampling("anthropic", 12) if architecture in ("relu", "jumprelu") else None
    config = config_of(architecture, 40)
    figures = dict.fromkeys(("explained_variance", "loss_recovered", "loss_recovered_interval"))
    figures |= {"l0": 1.0, "ce": 1.0, "ce_sae": 1.0, "ce_zero": 2.0}

    def run(path, stop=None):
        folder, one = RunFolder(path, config, path.exists()), new_trainer(config, "cpu", torch.float32)
        one.autoencoder.b_enc.data[:8] = -1e3 if plan else 0.0  # dead from the beginning
        folder.start(one)
        revived = aided = 0
        for (events,) in map(dict.values, train([one], buffer_of(real_rows, 40, one.batch), 40, plan, 0)):
            folder.append(events)
            revived += sum(event.get("revived", 0) for event in events)
            aided += one.auxk and int((one.silent_F >= 1).sum())
            if one.batch == stop:
                return folder.save_resume(one)
        folder.save_checkpoint(one, dict(figures))
        if path.name == "whole":
            assert revived if plan else aided

    run(tmp_path / "whole")
    run(tmp_path / "parts", stop=17)
    run(tmp_path / "parts")
    for name in ("40.pt", "resume.pt", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["event"] == "checkpoint"


def trained(architecture, rows_ND, num_batches, **more):
    config = config_of(architecture, num_batches, **more)
    one = new_trainer(config, "cpu", torch.float32)
    for _ in train([one], buffer_of(rows_ND, num_batches), num_batches, None, 0):
        pass
    return one


@pytest.mark.parametrize(("flag", "architecture"), [("target_l0", "jumprelu"), ("k", "batchtopk")])
def test_l0_ends_at_what_was_asked_for(flag, architecture, real_rows, tmp_path):
    """As a checkpoint is used: each row for itself."""
    one = trained(architecture, real_rows, 150, **{flag: 12})
    config = config_of(architecture, 150, **{flag: 12})
    save_checkpoint(tmp_path / "150.pt", config, one.autoencoder, torch.zeros(256))
    f_NF = load_checkpoint(tmp_path / "150.pt").autoencoder.features(real_rows)
    assert (f_NF > 0).sum(1).float().mean().item() == pytest.approx(12, rel=0.15)


def test_the_tracked_threshold_is_the_mean_of_the_smallest_values_kept(real_rows):
    """Of all batches so far while they are few, then a running one."""
    config = config_of("batchtopk", 60, k=7, scale_dataset=False) | {"learning_rate": 1e-12}
    one, cuts, want = new_trainer(config, "cpu", torch.float32), [], None
    for _, x_ND in zip(range(60), buffer_of(real_rows, 60).batches(), strict=False):
        ae = one.autoencoder
        pre_NF = (x_ND - ae.b_dec) @ ae.W_enc + ae.b_enc
        cuts.append(pre_NF.flatten().sort(descending=True).values[7 * len(x_ND) - 1].item())
        one.step(x_ND)
        share = max(0.03, 1 / len(cuts))
        want = cuts[0] if want is None else want + share * (cuts[-1] - want)
        assert one.autoencoder.threshold.unique().item() == pytest.approx(want, rel=1e-3)
        if len(cuts) == 20:
            assert want == pytest.approx(sum(cuts) / 20, rel=1e-6)


def test_schedules_by_hand():
    schedule, constant = trainer.Schedule(100, 10, 20, 5), trainer.CONSTANT
    rates = {batch: schedule.learning_rate(batch) for batch in (0, 4, 9, 10, 80, 90, 99)}
    assert rates == pytest.approx({0: 0.1, 4: 0.5, 9: 1, 10: 1, 80: 1, 90: 0.5, 99: 0.05})
    assert [schedule.penalty(batch) for batch in (0, 3, 4, 50)] == pytest.approx([0.2, 0.8, 1, 1])
    assert {constant.learning_rate(batch) * constant.penalty(batch) for batch in (0, 9, 99)} == {1}


def test_schedules_reach_the_step(real_rows):
    config = config_of("relu", 10, lr_warmup_batches=4, lr_decay_batches=2, l1_warmup_batches=5)
    one, plain = (new_trainer(some, "cpu", torch.float32) for some in (config, config_of("relu", 10)))
    rates = []
    for x_ND in real_rows[:1280].split(128):
        one.step(x_ND)
        plain.step(x_ND)
        rates.append(one.optimizer.param_groups[0]["lr"] / 1e-3)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5])
    assert (one.losses[0][1] / plain.losses[0][1]).item() == pytest.approx(0.2)


def test_defaults_and_refusals_of_the_flags():
    """relu keeps its documented behaviour: nothing moves."""
    relu, topk = config_of("relu", 1000), config_of("batchtopk", 1000)
    names = ("lr_warmup_batches", "lr_decay_batches", "l1_warmup_batches", "scale_dataset", "k", "auxk")
    assert [relu[name] for name in names] == [0, 0, 0, False, None, False]
    assert [topk[name] for name in names] == [50, 200, 0, True, 32, True]
    assert config_of("topk", 10**6)["lr_warmup_batches"] == 1000
    assert config_of("topk", 10, lr_decay_batches=0)["lr_decay_batches"] == 0
    assert not config_of("topk", 10, neuron_resampling_method="anthropic")["auxk"]
    assert not config_of("topk", 10, normalize_dataset=True)["scale_dataset"]
    assert config_of("jumprelu", 10)["target_l0"] == 32
    assert of_architecture(FLAGS | {"architecture": "jumprelu"}, 10, 20)["target_l0"] == 20
    for more, words in [
        ({"architecture": "relu", "k": 3}, "--k needs --architecture topk or batchtopk, got relu"),
        ({"architecture": "topk", "target_l0": 3.0}, "--target_l0 needs --architecture jumprelu, got topk"),
        ({"architecture": "topk", "k": 257}, "--k of at most 256 .* got 257"),
        ({"architecture": "jumprelu", "target_l0": 257.0}, "--target_l0 of at most 256 .* got 257"),
        ({"architecture": "relu", "scale_dataset": True, "normalize_dataset": True}, "got both"),
    ]:
        with pytest.raises(InputError, match=words):
            config_of(num_batches=10, **more)


def test_gradients_of_the_topk_family_are_clipped(real_rows):
    norms = {}
    for architecture in ARCHITECTURES:
        one = trained(architecture, real_rows * 100, 1, scale_dataset=False)
        norms[architecture] = torch.stack([weight.grad.norm() for weight in one.trained]).norm().item()
    assert max(norms["topk"], norms["batchtopk"]) < 1.0001
    assert min(norms["topk"], norms["batchtopk"]) > 0.5
    assert min(norms["relu"], norms["jumprelu"]) > 1.1
