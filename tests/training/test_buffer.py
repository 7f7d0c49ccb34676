import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sae.processes import ALONE
from sae.training.buffer import SharedBuffer, ShuffleBuffer, llm_batches


def stream(start, stop, chunk=7):
    for first in range(start, stop, chunk):
        yield torch.arange(first, min(first + chunk, stop)).float()[:, None].repeat(1, 3)


def drawn(buffer, first=0):
    return [batch[:, 0].int().tolist() for batch in buffer.batches(first)]


@pytest.mark.parametrize(("num_batches", "capacity"), [(12, 4), (13, 4), (3, 8), (9, 1), (11, 5)])
def test_every_row_is_used_once(num_batches, capacity):
    batches = drawn(ShuffleBuffer(stream(0, num_batches * 4 + 3), 4, num_batches, capacity, seed=0))
    assert [len(batch) for batch in batches] == [4] * num_batches
    assert sorted(itertools.chain(*batches)) == list(range(num_batches * 4))


def test_batches_are_drawn_across_the_whole_block():
    batches = drawn(ShuffleBuffer(stream(0, 4000), 20, 200, 50, seed=0))
    for number, batch in enumerate(batches):
        block = number // 50 * 1000
        assert all(block <= row < block + 1000 for row in batch)
        assert np.ptp(batch) > 500
    assert abs(np.mean(batches[0]) - 500) < 250


def test_each_block_is_dealt_out_in_an_order_of_its_own():
    batches = drawn(ShuffleBuffer(stream(0, 240), 4, 60, 20, seed=0))
    orders = [
        [row - block * 80 for batch in batches[block * 20 :][:20] for row in batch] for block in range(3)
    ]
    assert all(sorted(order) == list(range(80)) for order in orders)
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 20


def test_a_sample_is_drawn_over_the_whole_block():
    buffer = ShuffleBuffer(stream(0, 4000), 20, 200, 200, seed=0)
    next(buffer.batches())
    one, other = (buffer.sample(50, np.random.default_rng(seed)).tolist() for seed in (0, 1))
    assert len(set(one)) == len(set(other)) == 50 and len(set(one) & set(other)) < 10


@pytest.mark.parametrize("first", [0, 1, 3, 4, 9, 12])
def test_a_later_start_gives_the_same_batches(first):
    whole = drawn(ShuffleBuffer(stream(0, 52), 4, 13, 4, seed=5))
    block_row = first // 4 * 4 * 4
    assert drawn(ShuffleBuffer(stream(block_row, 52), 4, 13, 4, seed=5), first) == whole[first:]


def test_chunk_sizes_and_seed():
    one = drawn(ShuffleBuffer(stream(0, 40, 3), 4, 10, 5, seed=1))
    assert one == drawn(ShuffleBuffer(stream(0, 40, 11), 4, 10, 5, seed=1))
    assert one != drawn(ShuffleBuffer(stream(0, 40, 3), 4, 10, 5, seed=2))


@pytest.mark.parametrize("first", [5, 6, 9, 11])
def test_sample_is_the_same_after_a_restart(first):
    def sampled(buffer, start):
        for number, _batch in enumerate(buffer.batches(start), start):
            if number == first:
                return buffer.rows(buffer.sample(9, np.random.default_rng(0)))[:, 0].tolist()

    whole = sampled(ShuffleBuffer(stream(0, 52), 4, 13, 4, seed=5), 0)
    again = sampled(ShuffleBuffer(stream(first // 4 * 16, 52), 4, 13, 4, seed=5), first)
    assert whole == again
    assert len(set(whole)) == 9


def test_memory_is_one_block_in_the_streams_precision():
    buffer = ShuffleBuffer((chunk.bfloat16() for chunk in stream(0, 400)), 4, 100, 5, seed=0)
    seen = {buffer._rows_ND.data_ptr() for _ in buffer.batches()}
    assert len(seen) == 1
    assert buffer._rows_ND.shape == (20, 3)
    assert buffer._rows_ND.dtype == torch.bfloat16


def test_llm_batches_cover_each_epoch_in_a_new_order():
    contexts = list(itertools.chain(*itertools.islice(llm_batches(10, 4, seed=3), 5)))
    assert sorted(contexts[:10]) == sorted(contexts[10:]) == list(range(10))
    assert contexts[:10] != contexts[10:]
    assert (
        list(itertools.islice(llm_batches(10, 4, seed=3, start=2), 3))
        == list(itertools.islice(llm_batches(10, 4, seed=3), 5))[2:]
    )
    assert len(list(itertools.islice(llm_batches(3, 8, seed=0), 2))[1]) == 8


def shared(processes, num_batches, capacity, burst, first=0):
    """A SharedBuffer for each process: each gives its own rows, and where in the batch they belong."""
    here = SimpleNamespace(count=processes, placed=lambda rows, places, count: (rows, places, count))
    start = first // capacity * capacity * 4

    def chunks(rank):
        for number, rows in enumerate(stream(start, num_batches * 4 + burst * processes, burst)):
            yield rows if number % processes == rank else rows.to("meta")

    shape = 4, num_batches, capacity, 5, "cpu", here, burst
    return [SharedBuffer(chunks(rank), *shape) for rank in range(processes)]


def merged(parts):
    """The rows of all processes, each in its place; and each place was given once."""
    assert sorted(torch.cat([places for _, places, _ in parts]).tolist()) == list(range(parts[0][2]))
    whole = torch.empty(parts[0][2], 3)
    for rows, places, _count in parts:
        whole[places] = rows
    return whole[:, 0].int().tolist()


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize(
    ("num_batches", "capacity", "burst", "first"),
    [
        (200, 60, 8, 0),
        (200, 60, 8, 131),
        (61, 20, 50, 45),
        (9, 1, 3, 0),
        (90, 90, 7, 5),
        (30, 4, 1000, 0),
        (99, 60, 1, 0),
    ],
)
def test_processes_that_hold_their_own_rows_alone_draw_the_same_batches(
    processes, num_batches, capacity, burst, first
):
    whole = ShuffleBuffer(stream(first // capacity * capacity * 4, 5000), 4, num_batches, capacity, 5)
    buffers, number = shared(processes, num_batches, capacity, burst, first), first
    for batch, *parts in zip(whole.batches(first), *(one.batches(first) for one in buffers), strict=True):
        assert merged(parts) == batch[:, 0].int().tolist()
        slots = [one.sample(9, np.random.default_rng(number)) for one in (whole, *buffers)]
        drawn = [one.rows(some) for one, some in zip(buffers, slots[1:], strict=True)]
        assert merged(drawn) == whole.rows(slots[0])[:, 0].int().tolist()
        number += 1
    assert number == num_batches


def test_a_process_holds_its_share_of_the_buffer():
    for one in shared(4, 30_000, 10_000, 64):
        next(one.batches())
        assert 10_000 <= len(one._rows_ND) < 11_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: not run with rows on one")
def test_a_gpu_with_rows_of_its_own_is_not_waited_for():
    chunks = [rows_ND.cuda() for rows_ND in stream(0, 500)]
    buffer = SharedBuffer(chunks, 4, 60, 20, 5, "cuda:0", ALONE, 7)
    wanted = [batch.tolist() for batch in ShuffleBuffer(stream(0, 500), 4, 60, 20, 5).batches()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(buffer.batches())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [batch.tolist() for batch in got] == wanted
