"""The processes that `deepspeed` started: their ranks, what they exchange, a model shared among them."""

import itertools
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from sae import InputError, cli

OTHERS_WAIT_S = 20
PIECE_BYTES = 2**22  # torch's store breaks the connection at a value of more than twice as many
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a line of ours says that a process has ended
HEADS = ("attention", "key_value")


class Lost(OSError):
    """Another process has ended, without a word to this one."""


class Processes(NamedTuple):
    """What they tell each other: every process has to make the same calls, in the same order."""

    rank: int
    count: int
    device: str  # of this process
    store: object = None  # torch.distributed's, kept by the first process: small things by name

    @property
    def neighbours(self):
        """How many of them are on this machine, this one included."""
        return min(self.count, int(os.environ.get("LOCAL_WORLD_SIZE") or self.count))

    def everyone(self, value):
        """The (small, picklable) values of all processes, in rank order."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        with _together() as dist:
            dist.all_gather_object(values, value)
        return values

    def from_first(self, value):
        """The first process's (small, picklable) value."""
        return self.everyone(value if self.rank == 0 else None)[0]

    def total(self, tensor):
        """In place, and at every process: the sum of all processes' tensors, bit for bit the same."""
        if self.count > 1:
            with _together() as dist:
                dist.all_reduce(tensor)
        return tensor

    def sum(self, number):
        """The sum of a whole number of each process; it goes over the CPU, so that no GPU is waited for."""
        if self.count == 1:
            return number
        import torch

        return int(self.total(torch.tensor(int(number))))

    def join(self, tensor, dim=0):
        """The tensors of all processes, which have one shape, in rank order along `dim`."""
        if self.count == 1:
            return tensor
        import torch

        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.count)]
        with _together() as dist:
            dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim)

    def placed(self, rows, places, count):
        """[count, ...]: the rows of all processes, each at its place; no place is named twice."""
        whole = rows.new_zeros(count, *rows.shape[1:])
        whole[places] = rows
        return self.total(whole)

    def share(self, count):
        """This process's slice of range(count): contiguous, about as long as those of the others."""
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def own(self, whole, dim):
        """This process's share of a tensor along `dim`; all of it where that is None."""
        if dim is None or self.count == 1:
            return whole
        mine = self.share(whole.shape[dim])
        return whole.narrow(dim, mine.start, mine.stop - mine.start)

    def whole(self, own, dim):
        """The inverse of `own`: the whole tensor on the first process's CPU, held once there; else None."""
        if dim is None or self.count == 1:
            return own
        if dim:
            whole = self.whole(own.transpose(0, dim), 0)
            return whole if whole is None else whole.transpose(0, dim)
        lengths, own = self.everyone(len(own)), own.detach().cpu().contiguous()
        with _together() as dist:
            if self.rank:
                return dist.send(own, 0)
            whole = own.new_empty(sum(lengths), *own.shape[1:])
            for rank, part in enumerate(whole.split(lengths)):
                dist.recv(part, rank) if rank else part.copy_(own)
        return whole

    def hand_out(self, items, work, stopping):
        """Each process takes the next of `items` when it is free; the first one yields every `work(item)`.

        Results are plain values (JSON), yielded as they come in. Every process has to iterate to the end,
        where each waits for all. Once one is `stopping()`, none takes another item. Raises Lost where a
        process has died, after the results that had been finished.
        """
        import torch

        taken, mine = [0] * self.count, itertools.count()  # pieces of each process's lines, one a result
        line = [b""] * self.count  # what has come of the next

        def finished():
            for rank in range(self.count if self.rank == 0 else 0):
                while self._ask("check", [piece := f"{rank} {taken[rank]}"]):
                    line[rank] += self._ask("get", piece)
                    self._ask("delete_key", piece)
                    taken[rank] += 1
                    if line[rank].endswith(b"\n"):
                        yield json.loads(line[rank])
                        line[rank] = b""

        if self.rank == 0:
            self._ask("delete_key", "given")  # left by an earlier call
        self.everyone(None)
        with _together() as dist:  # the usual half an hour is less than some items take
            patient = dist.new_group(timeout=timedelta(days=999), backend="gloo")
        while not stopping() and (turn := self._ask("add", "given", 1)) <= len(items):
            text = json.dumps(work(items[turn - 1])) + "\n"
            for start in range(0, len(text), PIECE_BYTES):
                self._ask("set", f"{self.rank} {next(mine)}", text[start : start + PIECE_BYTES])
            yield from finished()
        self._ask("add", "given", len(items))  # after a stop nobody finds another item
        with _together() as dist:
            arrived = dist.all_reduce(torch.zeros(1), group=patient, async_op=True)
        while not arrived.is_completed():  # it also completes, in error, when a process has died
            yield from finished()
            time.sleep(0.05)
        yield from finished()
        with _together():
            arrived.wait()

    def _ask(self, what, *words):
        with _together():
            return getattr(self.store, what)(*words)

    @contextmanager
    def first_decides(self):
        """Within: checks of the first process (`if processes.rank == 0`). What it refuses, all refuse."""
        trouble = None
        try:
            yield
        except (InputError, OSError) as err:
            trouble = err
        said = self.from_first(trouble and str(trouble))
        if trouble:
            raise trouble
        if said:
            _wait_for_the_end()
            sys.exit(2)


ALONE = Processes(0, 1, None)


@contextmanager
def _together():
    """Within: torch.distributed. Raises Lost where one of the processes is no more."""
    import torch.distributed as dist

    try:
        yield dist
    except RuntimeError as err:
        raise Lost(f"all processes needed to the end, another one has ended ({err})"[:200]) from err


def _wait_for_the_end():
    """The first process prints the error; the launcher ends the others when it has left."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(OTHERS_WAIT_S)


def launched():
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= set(os.environ)


def alone_or_join(num_gpus):
    """The Processes that `deepspeed` started, or this one alone, on whatever device."""
    return join(num_gpus) if launched() or num_gpus > 1 else ALONE


def join(num_gpus):
    """The Processes; raises InputError unless `deepspeed` started `num_gpus` of them."""
    if not launched():
        raise InputError(
            f"a start with deepspeed needed: deepspeed --num_gpus {num_gpus} "
            f"{Path(sys.argv[0]).name} ... --num_gpus {num_gpus}, got one with python alone"
        )
    rank, count, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if num_gpus != count:
        raise InputError(f"--num_gpus {count} needed, as many as deepspeed started, got {num_gpus}")
    import torch

    gpus, store = torch.cuda.device_count(), None
    if gpus and local >= gpus:
        raise InputError(f"a GPU for each process needed, got {gpus} GPUs and a process number {local}")
    if gpus:
        torch.cuda.set_device(local)
    here = Processes(rank, count, f"cuda:{local}" if gpus else "cpu")
    if not gpus and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here.neighbours))
    if count > 1:
        # gloo beside nccl: what the processes tell each other goes over the CPU, no GPU waits for it.
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        try:
            store, _, _ = next(torch.distributed.rendezvous("env://"))
            torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
        except torch.distributed.DistError as err:
            raise InputError(f"a free port to meet at needed (deepspeed --master_port N), {err}") from err
    return here._replace(store=store)


def load_model(processes, name, dtype, parallel, trust_remote_code=False):
    """The LLM `name`: whole on this process's device ("data"), or this process's share of it ("tensor").

    A share is read without the rest where transformers has a plan for the architecture; elsewhere each
    process reads all of the model and DeepSpeed splits it. What one process refuses, all refuse.
    """
    from sae import models

    if processes.count == 1 or parallel == "data":
        return models.load_model(name, processes.device, dtype, trust_remote_code)
    bones, dtype = models.skeleton(name, dtype, trust_remote_code), models.pick_dtype(dtype, processes.device)
    if not bones.tp_plan or Path(name).suffix == ".gguf":
        return _split_by_deepspeed(processes, name, dtype, trust_remote_code)
    from transformers.distributed import DistributedConfig

    heads = {getattr(bones.config.get_text_config(), f"num_{kind}_heads", None) for kind in HEADS} - {None}
    # A head is not split: where the processes do not divide their number, each process has all of them.
    whole = {part: "replicate" for part in bones.tp_plan if "attn" in part or "attention" in part}
    uneven = any(count % processes.count for count in heads)
    share = DistributedConfig(tp_size=processes.count, tp_plan=whole if uneven else None)
    model = trouble = None
    try:
        model = models.load_model(name, processes.device, dtype, trust_remote_code, distributed_config=share)
    except InputError as err:
        trouble = err
    if said := [text for text in processes.everyone(trouble and str(trouble)) if text]:
        raise InputError(said[0])
    return model


def _split_by_deepspeed(processes, name, dtype, trust_remote_code):
    import deepspeed

    from sae import models

    if processes.rank == 0:
        said = "no plan for shares in transformers, each process reads all of it first"
        print(f"{name}: {said}", file=sys.stderr, flush=True)
    # Without GPUs it would compile a kernel first, and a run killed meanwhile leaves a lock that every later
    # run waits for, for ever. gloo adds up as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model, parts = models.load_model(name, "cpu", dtype, trust_remote_code), {"tp_size": processes.count}
    try:
        return deepspeed.init_inference(model, tensor_parallel=parts, dtype=dtype).module
    except AssertionError as err:  # its word for an architecture that it does not know
        raise InputError(f"--parallel data needed, DeepSpeed splits no {model.config.model_type}") from err


class Parser(cli.Parser):
    """A cli.Parser for every process at once: an error that all of them meet is printed by the first."""

    def error(self, message):
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # The launcher ends this process if the first one met the error too; if not, it is said here.
            if isinstance(message, Lost):
                time.sleep(2 * int(rank) - 2)
            else:
                _wait_for_the_end()
            message = f"process {rank}: {message}"
        super().error(message)

    @contextmanager
    def friendly_errors(self):
        with super().friendly_errors():
            try:
                yield
            except SystemExit as end:
                self.exit(end.code)

    def exit(self, status=0, message=None):
        if launched():
            # At once: torch's threads can abort an orderly end, and the launcher would pass on that status.
            print(message or "", end="", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(status or 0)
        super().exit(status, message)
