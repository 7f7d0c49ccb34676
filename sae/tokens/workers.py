"""Documents to a tokenised dataset with several processes, to be stopped and gone on with at any moment."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
import traceback
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path

from tqdm import tqdm

from sae import InputError
from sae.tokens import dataset, sources

SECONDS_BETWEEN_REPORTS = 0.25


class Stopped(Exception):
    """The worker was asked to stop."""


def find_contexts(tokenizer, documents, state, plan, process):
    """(ids, document number) of each context that `state` has not seen; keeps the counts in `state`.

    Document numbers are the reading order where process p reads the documents p, p + P, p + 2P ...
    """
    length, chunk = plan["min_tokens"], plan["chunk_documents"]
    for batch in _batches(documents, 1 if chunk else 64):
        texts = [text for _after, text in batch if isinstance(text, str)]
        first = iter([] if chunk else tokenizer.first_windows(texts, length))
        for after, text in batch:
            if isinstance(text, sources.Skipped):
                state.skipped[text.reason] = state.skipped.get(text.reason, 0) + 1
            else:
                windows = tokenizer.all_windows(text, length) if chunk else filter(None, [next(first)])
                for ids in islice(windows, state.windows, None):
                    state.windows += 1
                    yield ids, state.documents * plan["num_processes"] + process
                state.long_enough += state.windows > 0
            state.position, state.windows = after, 0
            state.documents += 1


def _batches(documents, most, most_chars=1 << 22):
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document[1])
        if len(batch) >= most or chars >= most_chars:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def run_worker(folder, plan, process, report, stopping, pause):
    """Write one worker's files; True when they are full, False when the documents ended first.

    `report(counts)` is called now and then. Raises Stopped, with everything saved, once `stopping()`.
    `pause(seconds)` waits for a network.
    """
    from sae.tokens.exact import ExactTokenizer

    state = dataset.load_states(folder, plan)[process]
    files = dataset.ArrowFiles(folder, plan, process, state)
    if files.full:
        report(state.counts() | {"contexts": files.contexts})
        return True
    readers = [
        partial(
            sources.read_documents,
            sources.open_patiently(arguments, pause),
            plan["seed"],
            process,
            plan["num_processes"],
            pause,
        )
        for arguments in source_arguments(plan)
    ]
    told = 0.0

    def watched(items):
        nonlocal told
        for item in items:
            if time.monotonic() - told > SECONDS_BETWEEN_REPORTS:
                told = time.monotonic()
                report(state.counts() | {"contexts": files.contexts})
                if stopping():
                    raise Stopped
            yield item

    tokenizer = ExactTokenizer((folder / "tokenizer.json").read_text())
    documents = watched(sources.alternate(readers, state.position))
    try:
        # Both: a document may have no context, or millions.
        for ids, document in watched(find_contexts(tokenizer, documents, state, plan, process)):
            files.add(ids, document)
            if files.full:
                return True
        return False
    finally:
        files.save()
        report(state.counts() | {"contexts": files.contexts})


def source_arguments(plan):
    """The plan's sources: one for each --data_dir."""
    keys = ("dataset_config", "split", "text_field", "seed")
    return [
        sources.SourceArguments(plan["dataset_name"], data_dir, *(plan[key] for key in keys))
        for data_dir in plan["data_dir"] or [None]
    ]


def _worker_main(folder, plan, process, parent, connection, stop):
    """A worker process: ends with the message done, short, stopped, or error and what it says."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def report(counts):
        connection.send(("counts", counts))

    def pause(seconds):
        end = time.monotonic() + seconds
        while not stopping() and time.monotonic() < end:
            stop.wait(min(seconds, 1))
        if stopping():
            raise Stopped

    def stopping():
        return stop.is_set() or os.getppid() != parent

    try:
        # An orphan of a killed run may still wait for a silent server.
        with lock(folder / f"worker-{process:05d}.lock", wait_s=sources.STALL_S + 30):
            full = run_worker(folder, plan, process, report, stopping, pause)
        connection.send(("done" if full else "short", None))
    except Stopped:
        connection.send(("stopped", None))
    except (InputError, OSError) as err:
        connection.send(("error", f"process {process}: {err}"))
    except BaseException:
        traceback.print_exc()
        raise


@contextmanager
def lock(path, wait_s=0.0):
    """Holds `path` for this process alone; the system lets go of it however the process ends."""
    with open(path, "a") as handle:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(f"one run at a time needed, another writes in {path.parent}") from None
                time.sleep(0.1)
        yield


def make_plan(flags, tokenizer_json):
    """The flags with what they stand for: all that decides about the bytes. Opens the sources once."""
    plan = flags | {"tokenizer_fingerprint": hashlib.sha256(tokenizer_json.encode()).hexdigest()[:16]}
    arguments = source_arguments(plan)
    # The hub's client tries several times by itself.
    pauses = sources.PAUSES[:3] if "://" in plan["dataset_name"] else ()
    opened = [sources.open_patiently(each, time.sleep, pauses) for each in arguments]
    plan["text_field"] = next((s.text_field for s in opened if isinstance(s, sources.Rows)), None)
    plan["shards"] = [source.num_shards for source in opened]
    return plan


def working_folder(save_path):
    return Path(save_path).absolute().parent / f".{Path(save_path).absolute().name}.partial"


def read_finished(save_path, flags):
    """The info of the dataset that these flags have written to `save_path` already, else None."""
    save_path = Path(save_path)
    if not save_path.exists() or (save_path.is_dir() and not any(save_path.iterdir())):
        return None
    if not (save_path / dataset.INFO_FILE).is_file():
        raise InputError(f"an empty or no folder needed at --save_path {save_path}, something else is there")
    try:
        info = json.loads((save_path / dataset.INFO_FILE).read_text())
        there = info["dataset_arguments"] | info
    except (ValueError, KeyError, TypeError):
        raise InputError(f"a whole {dataset.INFO_FILE} needed in --save_path {save_path}") from None
    _refuse_other_flags(there, flags, f"the dataset at {save_path}")
    return info


def _refuse_other_flags(there, flags, what):
    for key, value in flags.items():
        if key == "text_field" and value is None:
            continue
        if there.get(key) != value:
            raise InputError(
                f"the flags of {what} needed: --{key} was {there.get(key)!r}, {value!r} came; "
                "give the same flags to go on, or another --save_path"
            )


def start_or_resume(folder, plan, tokenizer_json):
    """The workers' states in the working folder, which is made when there is none."""
    plan_path = folder / "plan.json"
    if plan_path.exists() and (folder / "dataset").is_dir():
        _refuse_other_flags(json.loads(plan_path.read_text()), plan, f"what was begun in {folder}")
    else:
        _clear(folder)  # what a kill left that came while it was being removed
        (folder / "dataset").mkdir(parents=True)
        (folder / "tokenizer.json").write_text(tokenizer_json)
        dataset.save_json(plan_path, plan)
    return dataset.load_states(folder, plan)


def _clear(folder):
    """Empty the working folder, but for the lock that is held."""
    for path in folder.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def run_workers(folder, plan, stopping, show):
    """Run all workers to their ends; returns {process: "done", "short" or "stopped"} and the last counts.

    `show(counts of all processes)` is called now and then. The first error of a worker stops the others
    and is raised.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    workers, outcome, counts, errors = {}, {}, {}, []
    # Workers are told to stop. They inherit deaf ears; what reaches this process meanwhile comes afterwards.
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for process in range(plan["num_processes"]):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (folder, plan, process, os.getpid(), sender, stop)
            worker = context.Process(target=_worker_main, args=arguments, daemon=True)
            worker.start()
            sender.close()
            workers[receiver] = (process, worker)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
    try:
        while workers:
            for receiver in wait(list(workers), timeout=0.2):
                process, worker = workers[receiver]
                try:
                    kind, content = receiver.recv()
                except EOFError:
                    worker.join()
                    del workers[receiver]
                    if process not in outcome:
                        errors.append(f"process {process} died ({_how(worker.exitcode)})")
                        stop.set()
                    continue
                if kind == "counts":
                    counts[process] = content
                else:
                    outcome[process] = kind
                    if kind == "error":
                        errors.append(content)
                        stop.set()
            show(counts)
            if stopping():
                stop.set()
    finally:
        for _process, worker in workers.values():
            worker.kill()
    if errors:
        raise InputError(
            f"{errors[0]}. What is finished is kept in {folder}: the same command goes on from there"
        )
    return outcome, counts


def _how(exitcode):
    return f"signal {signal.Signals(-exitcode).name}" if exitcode < 0 else f"status {exitcode}"


def total(counts, key):
    return sum(count[key] for count in counts.values())


def _refuse_short(folder, plan, outcome, counts):
    """The documents ended too early: remove what was written and say what would fit."""
    short = [process for process, kind in outcome.items() if kind == "short"]
    per_worker = plan["num_files"] // plan["num_processes"]
    fits = min(counts[process]["contexts"] for process in short) // per_worker
    advice = (
        f"num_samples_per_file {fits} would fit"
        if fits
        else "fewer files, --chunk_documents or a smaller --min_tokens may fit"
    )
    shutil.rmtree(folder)
    raise InputError(
        f"{plan['num_files'] * plan['num_samples_per_file']} complete contexts of {plan['min_tokens']} "
        f"tokens needed, the documents ended after {total(counts, 'contexts')}, of "
        f"{total(counts, 'documents')} documents ({total(counts, 'long_enough')} long enough); {advice}"
    )


def write_dataset(save_path, flags, tokenizer_json, vocab_size, stopping):
    """Write the dataset that `flags` describe to `save_path`, going on where an earlier run was.

    flags: as on the command line. tokenizer_json: the text of a tokenizer.json. `stopping()` asks for an
    early end. Returns a line that says what was done, and whether it was done to the end.
    """
    folder = working_folder(save_path)
    if read_finished(save_path, flags):
        shutil.rmtree(folder, ignore_errors=True)
        return f"{save_path} is complete already, made with the same flags", True
    plan = make_plan(flags, tokenizer_json)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "lock"):
        states = start_or_resume(folder, plan, tokenizer_json)
        rows = plan["num_files"] * plan["num_samples_per_file"]
        there = sum(state.files * plan["num_samples_per_file"] + state.rows for state in states)
        if there:
            files = sum(state.files for state in states)
            print(f"going on from {folder}: {files} of {plan['num_files']} files, {there} of {rows} contexts")
        start = time.monotonic()
        with tqdm(total=rows, initial=there, unit=" contexts", smoothing=0.1) as bar:

            def show(counts):
                rate = (bar.n - there) * plan["min_tokens"] / (time.monotonic() - start)
                share = total(counts, "long_enough") / max(total(counts, "documents"), 1)
                said = f"{rate:,.0f} tokens/s, {share:.0%} of documents long enough"
                bar.set_postfix_str(said, refresh=False)
                bar.update(max(total(counts, "contexts") - bar.n, 0))

            outcome, counts = run_workers(folder, plan, stopping, show)
        if "short" in outcome.values():
            _refuse_short(folder, plan, outcome, counts)
        if "stopped" in outcome.values():
            return f"stopped; what is written is kept in {folder}, the same command goes on from there", False
        info = dataset.write_info(folder / "dataset", plan, dataset.load_states(folder, plan), vocab_size)
        os.replace(folder / "dataset", save_path)
        shutil.rmtree(folder)
    seconds = time.monotonic() - start
    skipped = "".join(f", {count} skipped ({why})" for why, count in info["documents_skipped"].items())
    said = (
        f"wrote {rows} contexts of {plan['min_tokens']} tokens in {plan['num_files']} files to {save_path} "
        f"in {seconds:.1f} s ({(rows - there) * plan['min_tokens'] / seconds:,.0f} tokens/s); "
        f"{info['documents']} documents, {info['documents_long_enough']} long enough{skipped}"
    )
    return said, True
