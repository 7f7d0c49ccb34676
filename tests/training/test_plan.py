"""What a run needs, reckoned by hand: memory, time, contexts to judge by."""

from types import SimpleNamespace

import pytest
import torch

from sae import InputError, models
from sae.autoencoder import Autoencoder
from sae.training import plan
from sae.training.config import held_out_contexts
from sae.training.plan import Place, plan_memory
from sae.training.trainer import Trainer

CONFIG = {
    "num_batches": 200, "epoch_batches": 300, "batch_size_autoencoder": 16, "act_vec_size": 32, "auxk": False,
    "dict_vec_size": 128, "batch_size_llm": 2, "context_rows": 20, "min_tokens": 20, "dtype_llm": "bfloat16",
}  # fmt: skip
CPU = torch.device("cpu")


def test_the_buffer_fills_half_of_what_is_left_or_what_was_asked_for(tiny_llama, monkeypatch):
    skeleton = models.skeleton(tiny_llama, torch.bfloat16)
    own = plan.autoencoder_bytes([CONFIG], torch.float32)
    own += plan.llm_bytes(CONFIG, skeleton, torch.bfloat16)
    batch = 16 * 32 * 2 + 16 * 24  # rows as the LLM made them, and places

    def settled(batches, preload):
        monkeypatch.setattr(plan, "_free_bytes", lambda *_: own + int(batches * batch))
        places = Place(CPU, torch.bfloat16), Place(CPU, torch.float32)
        return plan_memory([CONFIG], preload, skeleton, *places)[0]

    assert [settled(100, None), settled(100, 90), settled(1000, None)] == [50, 90, 200]
    for batches, preload, most in ((100, 91, 90), (1.9, None, 0)):
        with pytest.raises(InputError, match=f"are left: at most {most}"):
            settled(batches, preload)
    with pytest.raises(InputError, match=r"for the autoencoder needed on cpu, .* too much"):
        settled(-1, None)


def test_more_of_a_thing_needs_its_own_memory(tiny_llama):
    skeleton = models.skeleton(tiny_llama, torch.bfloat16)
    one, two = (plan.autoencoder_bytes([CONFIG] * count, torch.float32) for count in (1, 2))
    assert two - one == 32 * 128 * 4 * 8  # matrices, their gradients and two moments
    sizes = [plan.llm_bytes(CONFIG | {"batch_size_llm": n}, skeleton, torch.bfloat16) for n in (2, 3)]
    assert sizes[1] - sizes[0] == 20 * (3 * 48 + 4 * 32 + 2 * 49152) * 2  # of a context


def test_a_containers_limit_counts_and_what_it_has_cached_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "Path", lambda _group: tmp_path)
    for name, text in (("current", "900"), ("stat", "anon 7\ninactive_file 200\n"), ("max", "1000")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert (plan._free_bytes(CPU), plan._free_bytes(CPU, 3)) == (300, 100)
    (tmp_path / "memory.max").write_text("max")
    assert plan._free_bytes(CPU) > 10**6


def test_a_state_is_written_beside_the_steps_of_a_gpu_where_a_copy_fits(monkeypatch):
    for free, fits in ((2 * 28 * 32 * 128, False), (2 * 28 * 32 * 128 + 1, True)):
        monkeypatch.setattr(plan, "_free_bytes", lambda _place, free=free: free)
        assert plan.writes_beside([CONFIG] * 2, torch.device("cuda")) == fits
        assert not plan.writes_beside([CONFIG], CPU)


def test_a_dry_run_reckons_with_the_share_of_an_llm_batch_that_a_step_takes(tiny_llama, monkeypatch):
    """By a clock that goes on by a second whenever it is read: of 40 rows of each of two a step takes 16."""
    seconds, asked, here = iter(range(99)), [], SimpleNamespace(count=2, rank=0, total=lambda rows: rows)
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(plan, "forecast", lambda _config, *times, **_: asked.extend(times))
    model = models.load_model(tiny_llama, "cpu", "float32")
    place, config = Place(CPU, torch.float32), CONFIG | {"skip_positions": 0}
    run = SimpleNamespace(config=config, autoencoder=place, llm=place, here=here, training_rows=[0, 1])
    run.contexts = lambda _rows: [torch.arange(40).view(2, 20)]
    trainer = Trainer(Autoencoder(32, 128), 1e-3, 1.0)
    plan.timed_steps(run, model, model.model.layers[1].mlp, [trainer])
    assert asked == pytest.approx([16 / 80, 1, 1])


def test_contexts_to_judge_by_are_a_twentieth_of_what_is_trained_between_two_checkpoints():
    flags = {"num_batches": 0, "batches_between_ckpt": 12500, "batch_size_autoencoder": 256}
    flags |= {"num_tokens": 0, "held_out_contexts": 0}
    for more, contexts in (
        ({}, 2500), ({"num_batches": 5000}, 1000), ({"num_tokens": 32, "num_batches": 5000}, 2000),
        ({"batches_between_ckpt": 0}, 1500), ({"num_batches": 9}, 128), ({"num_tokens": 16}, 4096),
        ({"held_out_contexts": 7}, 7),
    ):  # fmt: skip
        assert held_out_contexts(flags | more, {"rows": 30_000, "min_tokens": 64}) == contexts, more
