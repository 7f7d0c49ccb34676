"""Rows in stream order -> well shuffled batches, in one preallocated block of memory."""

import functools
import itertools
import math

import numpy as np
import torch


class ShuffleBuffer:
    """Cuts a stream into blocks of `capacity` batches and deals each block out in random order.

    A block's batches are drawn across the whole of it, and each row is used once. The next block is written
    into the slots that the drawn batches leave, so one block of memory is all there ever is, and the LLM
    works steadily instead of in bursts. What batch n holds depends on the stream, the seed and n alone: a run
    is resumed by starting the stream at the first row of block `first // capacity` and asking for `first`.

    chunks: iterator of rows [any, D], all of one dtype. num_batches: how many batches the whole stream gives.
    """

    def __init__(self, chunks, batch_size, num_batches, capacity, seed, device="cpu"):
        self._chunks, self._chunk = iter(chunks), ()
        self.batch_size, self.num_batches, self.capacity = batch_size, num_batches, capacity
        self.seed, self.device = seed, device
        self._rows_ND = self._order_N = None

    def batches(self, first=0):
        """Yields the batches [batch_size, D] from number `first` on."""
        block = first // self.capacity
        slots_N = torch.arange(self._block_batches(block) * self.batch_size, device=self.device)
        for start in range(0, len(slots_N), self.batch_size):
            self._fill(slots_N[start : start + self.batch_size], len(slots_N))
        while len(slots_N):
            rng = np.random.default_rng([self.seed, block])
            self._order_N = slots_N[torch.from_numpy(rng.permutation(len(slots_N))).to(self.device)]
            refills = self._block_batches(block + 1)
            for step, drawn_N in enumerate(self._order_N.split(self.batch_size)):
                if block * self.capacity + step >= first:
                    yield self.rows(drawn_N)
                if step < refills:
                    self._fill(drawn_N, len(slots_N))
            slots_N = self._order_N[: refills * self.batch_size]
            block += 1

    def sample(self, count, rng):
        """Slots of `count` random rows (fewer where fewer are held), for `rows`. rng: numpy Generator."""
        # Drawn by place in the order, not by slot: a resumed run has other slots but the same order.
        places = rng.permutation(len(self._order_N))[:count]
        return self._order_N[torch.from_numpy(places).to(self.device)]

    def rows(self, slots):
        return self._rows_ND[slots]

    def _block_batches(self, block):
        return max(0, min(self.capacity, self.num_batches - block * self.capacity))

    def _fill(self, slots_N, size):
        """Write the next rows of the stream into these slots."""
        while len(slots_N):
            if not len(self._chunk):
                self._chunk = next(self._chunks)
            if self._rows_ND is None:
                self._allocate(size)
            new_ND, self._chunk = self._chunk[: len(slots_N)], self._chunk[len(slots_N) :]
            self._write(slots_N[: len(new_ND)], new_ND)
            slots_N = slots_N[len(new_ND) :]

    def _allocate(self, size):
        self._rows_ND = self._chunk.new_empty(size, self._chunk.shape[1], device=self.device)

    def _write(self, slots_N, new_ND):
        self._rows_ND[slots_N] = new_ND.to(self.device)


class SharedBuffer(ShuffleBuffer):
    """The same batches at every one of several processes (`here`), each of which holds its own rows alone.

    chunks: those of all, in order; another one's are on the device "meta": a shape without memory. burst: how
    many rows one process gives at once. Every process draws the same slots; where it keeps a slot's row,
    `_place_N` says, -1 where it does not. All numbers lie on the CPU: no GPU is waited for.
    """

    def __init__(self, chunks, batch_size, num_batches, capacity, seed, device, here, burst):
        super().__init__(chunks, batch_size, num_batches, capacity, seed)
        slots = self._block_batches(0) * batch_size
        self._rows_device, self._here = torch.device(device), here
        self._place_N = torch.full((slots,), -1)
        self._size = own_rows(slots, burst, here.count)
        self._free_N = torch.arange(self._size)  # places for rows to come

    def rows(self, slots):
        """The rows in these slots: [n, D], at every process."""
        place_n = self._place_N[slots]
        own = (place_n >= 0).nonzero()[:, 0]
        own_nD = self._rows_ND[self._sent(place_n[own])]
        return self._here.placed(own_nD, self._sent(own), len(slots))

    def _allocate(self, _size):
        self._rows_ND = self._chunk.new_empty(self._size, self._chunk.shape[1], device=self._rows_device)

    def _write(self, slots_N, new_ND):
        place_N = self._place_N[slots_N]  # of rows that have been drawn
        if (place_N >= 0).any():
            self._free_N = torch.cat([place_N[place_N >= 0], self._free_N])
        self._place_N[slots_N] = -1
        if new_ND.is_meta:
            return
        assert len(slots_N) <= len(self._free_N), "own_rows is too few"
        place_N, self._free_N = self._free_N[: len(slots_N)], self._free_N[len(slots_N) :]
        self._place_N[slots_N] = place_N
        self._rows_ND[self._sent(place_N)] = new_ND.to(self._rows_device)

    def _sent(self, numbers):
        """Where the rows are; to a GPU out of pinned memory, for it is waited for by any other copy."""
        pinned = numbers.pin_memory() if self._rows_device.type == "cuda" else numbers
        return pinned.to(self._rows_device, non_blocking=True)


def own_rows(slots, burst, processes):
    """How many of the rows in a buffer lie at one process at most.

    Its share; two passes of the LLM, by which it may be ahead of the others; and 16 standard deviations of
    what a draw takes from one process.
    """
    return min(slots, -(-slots // processes) + 2 * burst + 4 * math.isqrt(slots))


def llm_batches(num_contexts, batch_size, seed, start=0):
    """Endless batches of context numbers: epochs one after the other, each in an order of its own.

    start: the number of the first batch wanted. A batch may span two epochs, so every batch is full.
    """

    @functools.lru_cache(maxsize=2)
    def order(epoch):
        return np.random.default_rng([seed, 1, epoch]).permutation(num_contexts)

    for first in itertools.count(start * batch_size, batch_size):
        places = range(first, first + batch_size)
        yield [int(order(place // num_contexts)[place % num_contexts]) for place in places]
