"""What the scripts share on the command line: value parsers, one-line errors, stopping on a signal."""

import argparse
import contextlib
import math
import operator
import os
import signal
import sys

from sae import InputError

CODELLAMA = "codellama/CodeLlama-7b-Instruct-hf"
STOPPED = 130  # exit status after Ctrl-C or SIGTERM: a wrapper must not go on to the next script
TRUST_REMOTE_CODE = {"action": "store_true", "help": "run the Python code that some models bring with them"}
DTYPE = {"choices": ("auto", "float32", "bfloat16", "float16"), "default": "auto"}
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a network that fails ends in a line of ours
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with the default in every help text, exact flag names, and errors of one line (status 2)."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def parse_args(self, words=None):
        args, surplus = self.parse_known_args(words)
        if surplus:  # words that are no flags may be parts of an API key
            shown = (word if word.startswith("--") or "api_key" not in args else "..." for word in surplus)
            self.error(f"the arguments of --help needed alone, more came: {' '.join(shown)}")
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")

    @contextlib.contextmanager
    def friendly_errors(self):
        """What a user can cause (InputError, OSError) ends in one line, status 2; bugs keep tracebacks."""
        try:
            yield
        except (InputError, OSError) as err:
            self.error(err)


def number(kind=float, **limits):
    """argparse type: a finite number. limits: least <= number <= most, above < number < below."""
    tests = {"least": operator.ge, "most": operator.le, "above": operator.gt, "below": operator.lt}
    words = {"least": "at least", "most": "at most"}
    said = "".join(f", {words.get(name, name)} {limit}" for name, limit in limits.items())

    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and all(tests[name](value, limits[name]) for name in limits):
                return value
        what = "whole" if kind is int else "finite"
        raise argparse.ArgumentTypeError(f"needs a {what} number{said}, got {text!r}")

    return parse


def whole_number(least):
    return number(int, least=least)


def path(text):
    """argparse type: a place on disk; `~` is expanded here, for bash leaves it after `=`."""
    return os.path.expanduser(text)


def layer_first(words, layer_types):
    """`layer_id layer_type` before all flags: one that takes several values would swallow them behind it."""
    for place in range(1, len(words)):
        if words[place] in layer_types and words[place - 1].isdecimal():
            return words[place - 1 : place + 1] + words[: place - 1] + words[place + 1 :]
    return words


SEED = number(int, least=0, most=2**63 - 1)  # what torch takes


def until(stopping, items):
    """The items; once `stopping()` is true, KeyboardInterrupt instead of the next one."""
    for item in items:
        if stopping():
            raise KeyboardInterrupt
        yield item


def check_device(flag, name):
    """`name` as a torch.device of this machine, or InputError naming the flag and the devices there are."""
    import torch

    there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    found = "cuda:0" if name == "cuda" else name
    if found not in there:
        raise InputError(f"{flag} needs a device of this machine ({', '.join(there)}), got {name!r}")
    return torch.device(found)


def device_pair(llm, autoencoder, flags=("--device_llm", "--device_autoencoder")):
    """The torch.devices of two flags; None: cuda:0 and cuda:1, one GPU for both, or the cpu."""
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    return check_device(flags[0], llm or gpus[0]), check_device(flags[1], autoencoder or gpus[:2][-1])


def _launcher():
    """The process that started the one that started this one: `deepspeed`, as long as both are there."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(os.getppid()).ppid()


@contextlib.contextmanager
def stop_requested(forwarded=False):
    """Yields a function that says whether Ctrl-C or SIGTERM came; a second signal ends the process at once.

    `forwarded`: a launcher passes signals on, one Ctrl-C comes several times; only SIGKILL ends it at once.
    `deepspeed` itself dies of SIGTERM without a word to those it started: that it is gone counts as a signal.

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
    launcher = forwarded and _launcher()
    try:
        yield lambda: bool(received) or (forwarded and _launcher() != launcher)
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
