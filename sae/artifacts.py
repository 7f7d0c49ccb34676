"""Artifacts on disk: atomic writes, fingerprints, torch files that are never unpickled, a run's metrics."""

import fcntl
import hashlib
import json
import os
import secrets
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from sae import InputError


@contextmanager
def atomic_write(path, mode="wb"):
    """A file handle whose content appears at `path` whole or not at all (temporary name, fsync, rename)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, mode.replace("w", "x")) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path):
    """Make a file, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(handle, refusal):
    """Hold an open file for this process alone; the system lets go of it however the process ends."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(refusal) from None


def fingerprint(path):
    """The first 16 hex digits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def save_json(path, content):
    with atomic_write(path, "w") as handle:
        json.dump(content, handle, indent=1)


def read_metrics(path, batch):
    """The line of metrics.jsonl that a run wrote with its checkpoint at `batch`; {} where there is none."""
    lines = Path(path).read_bytes().splitlines() if Path(path).is_file() else []
    try:
        events = [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError) as err:
        raise InputError(f"a JSON object per line needed in {path}: {err}") from err
    wanted = {"event": "checkpoint", "batch": batch}
    return next((event for event in reversed(events) if wanted.items() <= event.items()), {})


def is_missing(name):
    """Whether `name`, of a model or dataset, must be meant as a place on disk and nothing is there.

    Where its first part is a folder here, so is what the hub's cache does not have.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not local and "/" in name and os.path.isdir(name.partition("/")[0]):
        cached = (f"{kind}--{name.replace('/', '--')}" for kind in ("models", "datasets"))
        local = not any(os.path.isdir(os.path.join(HF_HUB_CACHE, one)) for one in cached)
    return local and "://" not in name and not os.path.exists(name)


def check_folder(flag, path):
    """Refuse a folder that takes no files, or cannot be made, before the work that would end in writing."""
    path = Path(path).absolute()
    there = next(place for place in (path, *path.parents) if os.path.exists(place))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as err:
        came = f"{there} takes no files ({err.strerror})"
        raise InputError(f"{flag} needs a folder that can be written to, {path}: {came}") from None


def check_writable(flag, path, what, opens):
    """Refuse a file that cannot be written, or would replace anything but `what`, before the work for it.

    opens(path): truthy where the file there is such a one; it may also raise.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{flag} needs the name of a file to write, {path} is a folder")
    check_folder(flag, path.parent)
    with suppress(InputError, OSError):
        if not path.exists() or opens(path):
            return
    raise InputError(f"{flag} needs a new file or {what} to replace, {path} is neither")


def save_pt(path, content):
    """Write a dict of tensors and plain values so that `torch.load(path, weights_only=True)` opens it."""
    import torch

    with atomic_write(path) as handle:
        try:
            torch.save(content, handle)
        except RuntimeError as err:  # what torch makes of a full disk
            raise err.__context__ if isinstance(err.__context__, OSError) else err from None


def load_pt(path, kind, keys, mmap=False):
    """Read what `save_pt` wrote. `kind` names the artifact in errors, `keys` are those it must have.

    mmap: the tensors stay on disk until they are looked at.
    """
    import torch

    if not Path(path).is_file():
        raise InputError(f"{kind} needed at {path}, no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as err:  # torch raises a different type for each way a file can be wrong
        if isinstance(err, OSError):
            raise
        raise InputError(f"{kind} needed, {path} is truncated or no torch file of plain tensors") from err
    missing = [key for key in keys if key not in content] if isinstance(content, dict) else list(keys)
    if missing:
        raise InputError(f"{kind} needed, {path} lacks {', '.join(missing)}")
    return content


def check_origin(what, made_from, given, path):
    """Refuse two artifacts that do not belong together, naming both."""
    if made_from != given:
        raise InputError(f"{what} was made from fingerprint {made_from}, but {path} has {given}")
