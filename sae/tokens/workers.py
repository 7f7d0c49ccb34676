"""Documents to a tokenised dataset with several processes; finished files survive whatever ends a run.

Worker processes make contexts of documents, this process writes them to files. While it grows, a dataset lies
in a hidden folder: `progress.json` (the plan, the finished files, where each worker goes on after them) and
`dataset/` with the finished files, which are moved to their place at the very end.
"""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from sae import InputError, __version__, artifacts
from sae.tokens import dataset, sources

CONTEXTS_AT_ONCE = 128  # that a worker sends, and that are written in one batch
LONG_ENOUGH, TOO_SHORT = "long enough", "too short"


class State(NamedTuple):
    """How far one worker is: all that it needs to go on from there. Replaced, never changed."""

    turns: list | None = None  # of the sources, see sources.read_documents
    windows: int = 0  # contexts of the next document that are given already
    outcomes: dict = {}  # noqa: RUF012  LONG_ENOUGH, TOO_SHORT or why skipped: how many documents before it
    ended: bool = False


def find_contexts(tokenizer, documents, state, plan, process):
    """Each context as (ids [T], document number, State after it); at the end (None, None, the last State).

    Document numbers are the reading order where process p reads the documents p, p + P, p + 2P ... Where a
    file cannot be read on, the end is a text that says why.
    """
    import numpy as np

    bos = [plan["bos_token_id"]] if plan["add_bos"] else []
    try:
        for turns, text in documents:
            if isinstance(text, sources.Skipped):
                outcome = text.reason
            else:
                number = sum(state.outcomes.values()) * plan["num_processes"] + process
                windows = tokenizer.windows(text, plan["min_tokens"] - len(bos), plan["chunk_documents"])
                for ids in islice(windows, state.windows, None):
                    state = state._replace(windows=state.windows + 1)
                    yield np.array(bos + ids, dtype=np.int32), number, state
                outcome = LONG_ENOUGH if state.windows else TOO_SHORT
            state = State(turns, 0, Counter(state.outcomes) + Counter([outcome]))
        yield None, None, state._replace(ended=True)
    except (InputError, OSError) as err:
        yield str(err)


def count(states):
    """What came of the documents looked at; one that is being cut is long enough."""
    outcomes = Counter(LONG_ENOUGH for state in states if state.windows)
    for state in states:
        outcomes.update(state.outcomes)
    skipped = {outcome: outcomes[outcome] for outcome in sorted(outcomes.keys() - {LONG_ENOUGH, TOO_SHORT})}
    counts = {"documents": outcomes.total(), "documents_long_enough": outcomes[LONG_ENOUGH]}
    return counts | {"documents_skipped": skipped}


def _work(connection, opened, tokenizer_path, plan, process, state):
    """A worker process: sends in lists what it finds."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from sae.tokens.exact import ExactTokenizer

    documents = sources.read_documents(opened, plan["seed"], process, plan["num_processes"], state.turns)
    contexts = find_contexts(ExactTokenizer(tokenizer_path.read_text()), documents, state, plan, process)
    with suppress(BrokenPipeError):  # the run has ended
        while found := list(islice(contexts, CONTEXTS_AT_ONCE)):
            connection.send(found)


def make_plan(flags, tokenizer_folder, bos_token_id):
    """A source for each --data_dir; and the plan: the flags, and all else that decides on the bytes."""
    from tokenizers import Tokenizer

    tokenizer_json = (Path(tokenizer_folder) / "tokenizer.json").read_text()
    named = {key: flags[key] for key in ("dataset_config", "split", "text_field")}
    opened = [
        sources.open_source(flags["dataset_name"], data_dir, **named, tokenizer=str(tokenizer_folder))
        for data_dir in flags["data_dir"] or [None]
    ]
    columns = next((source.columns for source in opened if source.columns), None)
    if columns:
        print(f"the text is taken from the column {' + '.join(columns)}")
    elif flags["text_field"]:
        raise InputError(f"--text_field needs data files, {flags['dataset_name']} holds source files alone")
    return opened, flags | {
        "text_field": columns,
        "bos_token_id": bos_token_id,
        "vocab_size": Tokenizer.from_str(tokenizer_json).get_vocab_size(),
        "tokenizer_fingerprint": dataset.tokenizer_fingerprint(tokenizer_json),
        "shards": [len(source.paths) for source in opened],
        "suite_version": __version__,  # another may have other notes of what it has begun
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
            needed = f"an empty or no folder needed at --save_path {save_path}"
            raise InputError(f"{needed}, something else is there")
        artifacts.check_folder("--save_path", save_path)
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
        one = [was] if key == "text_field" and isinstance(was, str) else was
        # What is off may be missing, in a dataset of version 0.1; a column may have been found.
        if (one or None) != (value or None) and (key != "text_field" or value):
            raise InputError(
                f"the flags of {what} needed: --{key} was {was!r}, {value!r} came; "
                "give the same flags to go on, or another --save_path"
            )


def begin_or_go_on(folder, plan, tokenizer_folder):
    """What is finished in the folder, as `progress.json` has it; begun where there is nothing."""
    path = folder / "progress.json"
    progress = json.loads(path.read_text()) if path.exists() else None
    if progress and not progress["ended"]:
        _refuse_other_flags(progress["plan"], plan, f"what was begun in {folder}")
    # After flags for which the documents did not suffice, a run with others begins anew.
    if not progress or (progress["ended"] and progress["plan"] != plan):
        shutil.rmtree(folder / "dataset", ignore_errors=True)
        shutil.copytree(tokenizer_folder, folder / "dataset" / dataset.TOKENIZER)
        progress = {"plan": plan, "files": [], "states": [State()] * plan["num_processes"], "ended": False}
        artifacts.save_json(path, progress)
    for half in (folder / "dataset").glob(".*.partial"):  # of a file that a kill has interrupted
        half.unlink()
    return progress


@contextmanager
def working(opened, tokenizer_path, plan, states, watch):
    """Within: worker processes, and for each what it finds (see `_listen`). On leaving they are killed."""
    context, crew = multiprocessing.get_context("spawn"), []
    # Workers inherit blocked signals: one to the whole group is for this process alone, which ends them.
    resource_tracker.ensure_running()  # now, for starting it unblocks signals
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for process, state in enumerate(states):
            here, there = context.Pipe(duplex=False)
            arguments = there, opened, tokenizer_path, plan, process, state
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            there.close()
            crew.append((process, worker, here))
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        yield [_listen(*each, watch) for each in crew]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        for _process, worker, _connection in crew:
            worker.kill()
            worker.join()


def _listen(process, worker, connection, watch):
    """The contexts that a worker sends, as `find_contexts` gives them; `watch(0)` meanwhile."""
    while True:
        while not connection.poll(0.2):
            watch(0)
        try:
            sent = connection.recv()
        except (EOFError, ConnectionResetError):
            worker.join()
            status = worker.exitcode
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            raise InputError(f"process {process} died ({how})") from None
        for each in sent:
            if isinstance(each, str):
                raise InputError(f"process {process}: {each}")
            yield each


def deal(streams, states, wanted, watch):
    """Batches (ids [N, T], documents [N]) of `wanted` contexts in all, fewer where the documents end before.

    The workers give equal shares in turn; when one has no more documents, the others take over its share. So
    the order depends on documents and flags alone. `states` follow; `watch(new contexts)` is called often.
    """
    import numpy as np

    while wanted and (at_work := [process for process, state in enumerate(states) if not state.ended]):
        share, more = divmod(min(wanted, CONTEXTS_AT_ONCE * len(at_work)), len(at_work))
        for turn, process in enumerate(at_work):
            given = []
            while len(given) < share + (turn < more) and not states[process].ended:
                *context, states[process] = next(streams[process])
                given += [] if states[process].ended else [context]
            wanted -= len(given)
            watch(len(given))
            if given:
                ids, documents = zip(*given, strict=True)
                yield np.stack(ids), np.array(documents)


def _write_files(folder, opened, plan, progress, stopping):
    """Write the files that are missing, noting each in `progress` when it is finished."""
    num_files, rows_each = plan["num_files"], plan["num_samples_per_file"]
    there, states = len(progress["files"]), [State(*state) for state in progress["states"]]
    bar = tqdm(total=num_files * rows_each, initial=there * rows_each, unit=" contexts", smoothing=0.1)

    def watch(new):
        counts = count(states)
        share = counts["documents_long_enough"] / max(counts["documents"], 1)
        bar.set_postfix_str(f"{share:.0%} of documents long enough", refresh=False)
        bar.update(new)
        if stopping():
            raise KeyboardInterrupt

    tokenizer_path = folder / "dataset" / dataset.TOKENIZER / "tokenizer.json"
    with bar, working(opened, tokenizer_path, plan, states, watch) as streams:
        for number in range(there, num_files):
            path = folder / "dataset" / dataset.file_name(plan, number)
            batches = deal(streams, states, rows_each, watch)
            rows, *written = dataset.write_arrow(path, batches, plan["min_tokens"])
            progress["ended"] = rows < rows_each
            if not progress["ended"]:
                progress |= {"files": [*progress["files"], written], "states": list(states)}
            artifacts.save_json(folder / "progress.json", progress)
            if progress["ended"]:
                path.unlink()
                contexts = number * rows_each + rows
                less = "fewer files, --chunk_documents or a smaller --min_tokens may"
                if fits := contexts // num_files:
                    less = f"num_samples_per_file {fits} would"
                raise InputError(
                    f"{num_files * rows_each} complete contexts of {plan['min_tokens']} tokens needed, the "
                    f"documents ended after {contexts}, of {_looked_at(count(states))}; {less} fit"
                )


def _looked_at(counts):
    skipped = "".join(f", {many} skipped ({why})" for why, many in counts["documents_skipped"].items())
    return f"{counts['documents']} documents ({counts['documents_long_enough']} long enough{skipped})"


def write_dataset(save_path, flags, tokenizer_folder, stopping, bos_token_id=None):
    """Write the dataset that `flags` describe to `save_path`, going on where an earlier run was.

    flags: as on the command line. tokenizer_folder: what a fast tokenizer has saved. `stopping()` asks for an
    early end. Returns a line that says what was done, and whether it was done to the end.
    """
    place, folder = places(save_path)
    if read_finished(save_path, flags):
        shutil.rmtree(folder, ignore_errors=True)
        return f"{save_path} is complete already, made with the same flags", True
    (opened, plan), start = make_plan(flags, tokenizer_folder, bos_token_id), time.monotonic()
    num_files, rows, length = (plan[key] for key in ("num_files", "num_samples_per_file", "min_tokens"))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as handle:
        artifacts.lock(handle, f"one run at a time needed, another writes in {folder}")
        progress = begin_or_go_on(folder, plan, tokenizer_folder)
        there = len(progress["files"])
        if there:
            print(f"going on from {folder}: {there} of {num_files} files")
        try:
            if there < num_files:
                _write_files(folder, opened, plan, progress, stopping)
        except KeyboardInterrupt:
            done = f"stopped; {len(progress['files'])} of {num_files} files are finished and kept in {folder}"
            return f"{done}, the same command goes on from there", False
        except (InputError, OSError) as err:
            if progress["ended"] and not progress["files"]:  # nothing to go on with
                shutil.rmtree(folder)
                raise
            again = "" if progress["ended"] else ": the same command goes on from there"
            raise InputError(f"{err}. What is finished is kept in {folder}{again}") from err
        counts = count([State(*state) for state in progress["states"]])
        whole = folder / "dataset"
        dataset.write_info(whole, plan, progress["files"], counts)
        for path in (whole, *whole.rglob("*")):  # of the tokenizer's copy, too
            artifacts.sync(path)
        if place.exists():  # a folder, into which the info comes last
            for path in sorted(whole.iterdir(), key=lambda path: path.name == dataset.INFO_FILE):
                os.replace(path, place / path.name)
            artifacts.sync(place)
        else:
            os.replace(whole, place)
        artifacts.sync(place.parent)
        shutil.rmtree(folder)
    seconds = time.monotonic() - start
    said = f"wrote {num_files * rows} contexts of {length} tokens in {num_files} files to {save_path} in "
    rate = f"{seconds:.1f} s ({(num_files - there) * rows * length / seconds:,.0f} tokens/s)"
    return f"{said}{rate}; {_looked_at(counts)}", True
