"""What the scripts share on the command line: value parsers, one-line errors, stopping on a signal."""

import argparse
import math
import os
import signal
import sys
from contextlib import contextmanager

from sae import InputError

CODELLAMA = "codellama/CodeLlama-7b-Instruct-hf"
STOPPED = 130  # exit status after Ctrl-C or SIGTERM: a wrapper must not go on to the next script
TRUST_REMOTE_CODE = {"action": "store_true", "help": "run the Python code that some models bring with them"}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with the default in every help text, exact flag names, and errors of one line (status 2)."""

    def __init__(self, description):
        super().__init__(
            description=description,
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")

    @contextmanager
    def friendly_errors(self):
        """What a user can cause (InputError, OSError) ends in one line, status 2; bugs keep tracebacks."""
        try:
            yield
        except (InputError, OSError) as err:
            self.error(err)


def whole_number(least, most=None):
    """argparse type: an integer of at least `least` (and at most `most`)."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"needs a whole number, got {text!r}") from None
        if value < least or (most is not None and value > most):
            needed = f"at least {least}" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"needs a whole number, {needed}, got {value}")
        return value

    return parse


def number(least=-math.inf, above=-math.inf, below=math.inf):
    """argparse type: a finite float with least <= value, above < value < below."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"needs a number, got {text!r}") from None
        if not math.isfinite(value) or value < least or value <= above or value >= below:
            limits = {"at least": least, "above": above, "below": below}
            said = ", ".join(f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))
            raise argparse.ArgumentTypeError(
                f"needs a finite number{', ' + said if said else ''}, got {text}"
            )
        return value

    return parse


def path(text):
    """argparse type: a place on disk; `~` is expanded here, for bash leaves it after `=`."""
    return os.path.expanduser(text)


def layer_first(words, layer_types):
    """`layer_id layer_type` before all flags: one that takes several values would swallow them behind it."""
    for place in range(1, len(words)):
        if words[place] in layer_types and words[place - 1].isdecimal():
            return words[place - 1 : place + 1] + words[: place - 1] + words[place + 1 :]
    return words


SEED = whole_number(0, 2**63 - 1)  # what torch takes


def until(stopping, items):
    """The items, until `stopping()`: then KeyboardInterrupt, in the middle of long work without steps too."""
    for item in items:
        if stopping():
            raise KeyboardInterrupt
        yield item


def check_device(flag, name):
    """`name` as a torch.device of this machine, or InputError naming the flag and the devices there are."""
    import torch

    there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and device.type == "cuda" and device.index is None:
        device = torch.device("cuda:0")
    if device is None or str(device) not in there:
        raise InputError(f"{flag} needs a device of this machine ({', '.join(there)}), got {name!r}")
    return device


def default_devices():
    """The devices for the LLM and for the autoencoder: cuda:0 and cuda:1, one GPU for both, or the cpu."""
    import torch

    gpus = torch.cuda.device_count()
    return ("cpu", "cpu") if gpus == 0 else ("cuda:0", "cuda:1" if gpus > 1 else "cuda:0")


def device_pair(llm, autoencoder):
    """The torch.devices of --device_llm and --device_autoencoder, None: the default."""
    defaults = default_devices()
    return tuple(
        check_device(f"--device_{part}", name or default)
        for part, name, default in zip(("llm", "autoencoder"), (llm, autoencoder), defaults, strict=True)
    )


@contextmanager
def stop_requested(forwarded=False):
    """Yields a function that says whether Ctrl-C or SIGTERM came; a second signal ends the process at once.

    `forwarded`: a launcher passes signals on, one Ctrl-C comes several times; only SIGKILL ends it at once.

    with stop_requested() as stopping:
        for step in steps:
            if stopping():
                break
    """
    received = []

    def note(signum, _frame):
        received.append(signum)
        if forwarded and len(received) > 1:
            return
        print(f"\n{signal.Signals(signum).name}: finishing the current step", file=sys.stderr, flush=True)
        for sig in STOP_SIGNALS if not forwarded else ():
            signal.signal(sig, signal.SIG_DFL)

    before = {sig: signal.signal(sig, note) for sig in STOP_SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
