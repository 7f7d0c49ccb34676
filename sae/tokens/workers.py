"""Documents to a tokenised dataset with several processes; what is finished outlives every kind of end.

Worker processes make contexts of documents, this process writes them to files. While it grows, a dataset lies
in a hidden folder: `progress.json` (the plan, the finished files, where each worker goes on after them) and
`dataset/` with the finished files, which are moved to their place at the very end.
"""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter, deque
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice, repeat
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from sae import InputError, artifacts
from sae.tokens import dataset, sources

CONTEXTS_AT_ONCE = 128  # that a worker hands over


class State(NamedTuple):
    """How far one worker is: `windows` contexts of the document at `position` are given already."""

    position: list | None = None
    documents: int = 0  # read to their ends
    long_enough: int = 0
    windows: int = 0
    skipped: dict = {}  # noqa: RUF012  replaced, never changed
    ended: bool = False


def find_contexts(tokenizer, documents, state, plan, process):
    """Each context as (ids, document number, State after it); then, for ever, (None, None, the last State).

    Document numbers are the reading order where process p reads the documents p, p + P, p + 2P ...
    """
    bos = [plan["bos_token_id"]] if plan["add_bos"] else []
    for after, text in documents:
        if isinstance(text, sources.Skipped):
            state = state._replace(skipped=Counter(state.skipped) + Counter([text.reason]))
        else:
            number = state.documents * plan["num_processes"] + process
            windows = tokenizer.windows(text, plan["min_tokens"] - len(bos), plan["chunk_documents"])
            for ids in islice(windows, state.windows, None):
                state = state._replace(windows=state.windows + 1)
                yield bos + ids, number, state
        long_enough = state.long_enough + (state.windows > 0)
        state = State(after, state.documents + 1, long_enough, 0, state.skipped)
    yield from repeat((None, None, state._replace(ended=True)))


def count(states):
    """Of the documents looked at, also those that are being cut."""
    begun = sum(state.windows > 0 for state in states)
    skipped = sum((Counter(state.skipped) for state in states), Counter())
    return {
        "documents": sum(state.documents for state in states) + begun,
        "documents_long_enough": sum(state.long_enough for state in states) + begun,
        "documents_skipped": dict(sorted(skipped.items())),
    }


def _work(connection, folder, plan, process, state):
    """A worker process: answers each number with as many contexts, or says what went wrong."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from sae.tokens.exact import ExactTokenizer

    copy = folder / "dataset" / dataset.TOKENIZER
    try:
        readers = [
            partial(sources.read_documents, source, plan["seed"], process, plan["num_processes"])
            for source in open_sources(plan, copy)
        ]
        documents = sources.alternate(readers, state.position)
        tokenizer = ExactTokenizer((copy / "tokenizer.json").read_text())
        _answer(connection, find_contexts(tokenizer, documents, state, plan, process), plan["min_tokens"])
    except (InputError, OSError) as err:
        connection.send(str(err))
    except BaseException:
        traceback.print_exc()
        raise


def _answer(connection, contexts, length):
    """Sends, for each number N received, ids [N, length], documents [N] and the State; fewer at the end."""
    import numpy as np

    ahead = deque()  # made while nobody asks
    while True:
        while len(ahead) < CONTEXTS_AT_ONCE and not connection.poll():
            ahead.append(next(contexts))
        try:
            wanted = connection.recv()
        except EOFError:  # the run has ended
            sys.exit(0)
        given = []
        while len(given) < wanted:
            ids, document, state = ahead.popleft() if ahead else next(contexts)
            if ids is None:
                break
            given.append((ids, document))
        ids_NT = np.array([ids for ids, _document in given], dtype=np.int32).reshape(-1, length)
        connection.send((ids_NT, np.array([document for _ids, document in given], dtype=np.int64), state))


def open_sources(plan, tokenizer_folder):
    """The plan's sources: one for each --data_dir."""
    keys = ("dataset_config", "split", "text_field", "seed")
    chat = sources.chat_template(tokenizer_folder)
    arguments = [
        sources.SourceArguments(plan["dataset_name"], data_dir, *(plan[key] for key in keys))
        for data_dir in plan["data_dir"] or [None]
    ]
    # The hub's client tries several times by itself.
    pauses = sources.PAUSES[:3] if "://" in plan["dataset_name"] else ()
    return [sources.open_patiently(each, chat, pauses) for each in arguments]


def make_plan(flags, tokenizer_folder, bos_token_id):
    """The flags with what they stand for: all that decides about the bytes. Opens the sources once."""
    from tokenizers import Tokenizer

    tokenizer_json = (Path(tokenizer_folder) / "tokenizer.json").read_text()
    opened = open_sources(flags, tokenizer_folder)
    for link in [link for source in opened for link in source.left_out][:3]:
        print(f"a link is left out, it leads to nothing or to what is read anyway: {link}")
    columns = next((source.columns for source in opened if source.columns), None)
    if columns:
        print(f"the text is taken from the column {' + '.join(columns)}")
    return flags | {
        "text_field": columns,
        "bos_token_id": bos_token_id,
        "vocab_size": Tokenizer.from_str(tokenizer_json).get_vocab_size(),
        "tokenizer_fingerprint": dataset.tokenizer_fingerprint(tokenizer_json),
        "shards": [len(source.paths) for source in opened],
    }


def places(save_path):
    """Where the dataset goes and where it grows: beside that place, or in a folder that is there already."""
    place = Path(os.path.realpath(save_path))
    beside = place.parent / f".{place.name}.partial"
    return place, place / ".partial" if place.is_dir() and not beside.exists() else beside


def read_finished(save_path, flags):
    """The info of the dataset that these flags have written to `save_path` already, else None."""
    place, _growing = places(save_path)
    path = place / dataset.INFO_FILE
    if not path.is_file():
        there = {each.name for each in place.iterdir()} if place.is_dir() else {place.name}
        if place.exists() and ".partial" not in there and there - {"lost+found"}:
            came = f"{save_path}, something else is there"
            raise InputError(f"an empty or no folder needed at --save_path {came}")
        return None
    try:
        info = json.loads(path.read_text())
        there = info["dataset_arguments"] | info
    except (ValueError, KeyError, TypeError):
        raise InputError(f"a whole {path.name} needed in --save_path {save_path}") from None
    _refuse_other_flags(there, flags, f"the dataset at {save_path}")
    return info


def _refuse_other_flags(there, flags, what):
    for key, value in flags.items():
        was = there.get(key)
        was = [was] if key == "text_field" and isinstance(was, str) else was
        # What is off may be missing, in a dataset of version 0.1.
        if (was or None) != (value or None) and not (key == "text_field" and value is None):
            raise InputError(
                f"the flags of {what} needed: --{key} was {there.get(key)!r}, {value!r} came; "
                "give the same flags to go on, or another --save_path"
            )


@contextmanager
def lock(path):
    """Holds `path` for this process alone; the system lets go of it however the process ends."""
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"one run at a time needed, another writes in {path.parent}") from None
        yield


def begin_or_go_on(folder, plan, tokenizer_folder):
    """What is finished in the folder, as `progress.json` has it; begun where there is nothing."""
    path = folder / "progress.json"
    progress = json.loads(path.read_text()) if path.exists() else None
    if progress and not progress["ended"]:
        _refuse_other_flags(progress["plan"], plan, f"what was begun in {folder}")
    # Flags that suffice may follow those for which the documents have ended.
    if not progress or (progress["ended"] and progress["plan"] != plan):
        shutil.rmtree(folder / "dataset", ignore_errors=True)
        shutil.copytree(tokenizer_folder, folder / "dataset" / dataset.TOKENIZER)
        progress = {"plan": plan, "files": [], "states": [State()] * plan["num_processes"], "ended": False}
        artifacts.save_json(path, progress)
    for half in (folder / "dataset").glob(".*.partial"):  # of a file that a kill has interrupted
        half.unlink()
    return progress


@contextmanager
def working(folder, plan, states):
    """The worker processes, each with the connection to it; they end with the block, whatever they are at."""
    context, crew = multiprocessing.get_context("spawn"), []
    # Workers inherit what is blocked: a signal to the whole group is for this process, which ends them.
    resource_tracker.ensure_running()  # it lets signals through when it starts, which would be with the first
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for process, state in enumerate(states):
            here, there = context.Pipe()
            worker = context.Process(target=_work, args=(there, folder, plan, process, state), daemon=True)
            worker.start()
            there.close()
            crew.append((worker, here))
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        yield crew
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        for worker, _connection in crew:
            worker.kill()
            worker.join()


def deal(crew, states, wanted, watch):
    """Batches (ids [N, T], documents [N]) of `wanted` contexts in all, fewer where the documents end before.

    The workers give equal shares in turn; when one has no more documents, the others take over its share. So
    the order depends on documents and flags alone. `states` follow; `watch(new contexts)` is called often.
    """
    while wanted and (at_work := [process for process, state in enumerate(states) if not state.ended]):
        share, more = divmod(min(wanted, CONTEXTS_AT_ONCE * len(at_work)), len(at_work))
        asked = at_work if share else at_work[:more]
        for turn, process in enumerate(asked):
            with suppress(BrokenPipeError):  # it has died, as will be heard
                crew[process][1].send(share + (turn < more))
        for process in asked:
            ids_NT, documents_N, states[process] = _hear(process, *crew[process], watch)
            wanted -= len(ids_NT)
            watch(len(ids_NT))
            if len(ids_NT):
                yield ids_NT, documents_N


def _hear(process, worker, connection, watch):
    while not connection.poll(0.2):
        watch(0)
    try:
        answer = connection.recv()
    except (EOFError, ConnectionResetError):
        worker.join()
        status = worker.exitcode
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        raise InputError(f"process {process} died ({how})") from None
    if isinstance(answer, str):
        raise InputError(f"process {process}: {answer}")
    return answer


def _write_files(folder, plan, progress, stopping):
    """Write the files that are missing, noting each in `progress` when it is finished."""
    rows_each, states = plan["num_samples_per_file"], [State(*state) for state in progress["states"]]
    there, start = len(progress["files"]) * rows_each, time.monotonic()
    bar = tqdm(total=plan["num_files"] * rows_each, initial=there, unit=" contexts", smoothing=0.1)

    def watch(new):
        counts = count(states)
        rate = (bar.n - there) * plan["min_tokens"] / (time.monotonic() - start)
        share = counts["documents_long_enough"] / max(counts["documents"], 1)
        said = f"{rate:,.0f} tokens/s, {share:.0%} of documents long enough"
        bar.set_postfix_str(said, refresh=False)
        bar.update(new)
        if stopping():
            raise KeyboardInterrupt

    with bar, working(folder, plan, states) as crew:
        for number in range(len(progress["files"]), plan["num_files"]):
            path = folder / "dataset" / dataset.file_name(plan, number)
            batches = deal(crew, states, rows_each, watch)
            rows, *written = dataset.write_arrow(path, batches, plan["min_tokens"])
            progress["ended"] = rows < rows_each
            if progress["ended"]:
                path.unlink()
            else:
                progress |= {"files": [*progress["files"], written], "states": list(states)}
            artifacts.save_json(folder / "progress.json", progress)
            if progress["ended"]:
                raise InputError(_too_few(plan, number * rows_each + rows, count(states)))


def _too_few(plan, contexts, counts):
    fits = contexts // plan["num_files"]
    advice = (
        f"num_samples_per_file {fits}" if fits else "fewer files, --chunk_documents or a smaller --min_tokens"
    )
    return (
        f"{plan['num_files'] * plan['num_samples_per_file']} complete contexts of {plan['min_tokens']} "
        f"tokens needed, the documents ended after {contexts}, of {counts['documents']} documents "
        f"({counts['documents_long_enough']} long enough{_skipped(counts)}); "
        f"{advice} {'would' if fits else 'may'} fit"
    )


def _skipped(counts):
    return "".join(f", {many} skipped ({why})" for why, many in counts["documents_skipped"].items())


def _move(folder, place):
    """The finished dataset to its place; into a folder that is there already, the info last."""
    if place.exists():
        for path in sorted((folder / "dataset").iterdir(), key=lambda path: path.name == dataset.INFO_FILE):
            os.replace(path, place / path.name)
    else:
        os.replace(folder / "dataset", place)
    artifacts.sync_folder(place.parent)
    shutil.rmtree(folder)


def write_dataset(save_path, flags, tokenizer_folder, stopping, bos_token_id=None):
    """Write the dataset that `flags` describe to `save_path`, going on where an earlier run was.

    flags: as on the command line. tokenizer_folder: what a fast tokenizer has saved. `stopping()` asks for an
    early end. Returns a line that says what was done, and whether it was done to the end.
    """
    place, folder = places(save_path)
    if read_finished(save_path, flags):
        shutil.rmtree(folder, ignore_errors=True)
        return f"{save_path} is complete already, made with the same flags", True
    plan, start = make_plan(flags, tokenizer_folder, bos_token_id), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "lock"):
        progress = begin_or_go_on(folder, plan, tokenizer_folder)
        there = len(progress["files"])
        if there:
            print(f"going on from {folder}: {there} of {plan['num_files']} files")
        try:
            if there < plan["num_files"]:
                _write_files(folder, plan, progress, stopping)
        except KeyboardInterrupt:
            done = f"{len(progress['files'])} of {plan['num_files']} files"
            return (
                f"stopped; {done} are finished and kept in {folder}, the same command goes on from there",
                False,
            )
        except (InputError, OSError) as err:
            again = "" if progress["ended"] else ": the same command goes on from there"
            raise InputError(f"{err}. What is finished is kept in {folder}{again}") from err
        counts = count([State(*state) for state in progress["states"]])
        dataset.write_info(folder / "dataset", plan, progress["files"], counts)
        _move(folder, place)
    seconds = time.monotonic() - start
    new = (plan["num_files"] - there) * plan["num_samples_per_file"] * plan["min_tokens"]
    rows = plan["num_files"] * plan["num_samples_per_file"]
    said = (
        f"wrote {rows} contexts of {plan['min_tokens']} tokens in {plan['num_files']} files to {save_path} "
        f"in {seconds:.1f} s ({new / seconds:,.0f} tokens/s); "
        f"{counts['documents']} documents, {counts['documents_long_enough']} long enough{_skipped(counts)}"
    )
    return said, True
