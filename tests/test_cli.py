import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_refused, run_module

from sae import InputError, cli


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("12", 12)])
def test_whole_number(text, value):
    assert cli.whole_number(1)(text) == value


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "x", ""])
def test_whole_number_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="needs a whole number"):
        cli.whole_number(1)(text)


@pytest.mark.parametrize("text", ["nan", "inf", "0", "-1", "1", "x"])
def test_number_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="needs a"):
        cli.number(above=0, below=1)(text)


def test_number():
    assert cli.number(above=0, below=1)("0.5") == 0.5
    assert cli.number(least=0)("0") == 0
    assert cli.number(int, most=5)("5") == 5
    with pytest.raises(argparse.ArgumentTypeError, match="needs a finite number, at least 0, got 'inf'"):
        cli.number(least=0)("inf")


@pytest.mark.parametrize("name", ["cuda:97", "quantum", "mps:x"])
def test_check_device_names_what_there_is(name):
    with pytest.raises(InputError, match=f"--device needs a device of this machine .*cpu.*{name}"):
        cli.check_device("--device", name)


@pytest.mark.parametrize(
    ("count", "pair"), [(0, ("cpu", "cpu")), (1, ("cuda:0",) * 2), (4, ("cuda:0", "cuda:1"))]
)
def test_devices_where_none_is_named(count, pair, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert tuple(map(str, cli.device_pair(None, None))) == pair
    if count:
        assert tuple(map(str, cli.device_pair("cpu", "cuda"))) == ("cpu", "cuda:0")


def test_errors_are_one_line_and_bugs_keep_their_traceback():
    program = "from sae import InputError, cli\np = cli.Parser('x')\nwith p.friendly_errors():\n    raise {}"
    for error in ("InputError('needed a\\nand came b')", "OSError('disk full')"):
        assert_refused(_python(program.format(error)), "error:")
    bug = _python(program.format("ValueError('a bug')"))
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr


def test_the_beginning_of_a_flag_is_no_flag(capsys):
    parser = cli.Parser("x")
    parser.add_argument("--num_files")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--num", "3"])
    assert "more came: --num 3" in capsys.readouterr().err


def test_the_hub_retries_in_silence():
    program = "from sae import cli; from huggingface_hub.utils import logging; print(logging.get_verbosity())"
    assert _python(program).stdout == "40\n"


def _python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)


def test_stop_requested_notes_the_first_signal_and_restores_the_handlers():
    before = signal.getsignal(signal.SIGTERM)
    with cli.stop_requested() as stopping:
        assert not stopping()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert stopping()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one ends the process at once
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_item_that_comes_after_a_signal_is_not_begun():
    read, seen = [], []
    with pytest.raises(KeyboardInterrupt):
        for item in cli.until(lambda: len(read) == 2, (read.append(item) or item for item in "abc")):
            seen.append(item)
    assert seen == ["a"]
    assert list(cli.until(lambda: False, "abc")) == ["a", "b", "c"]


def test_a_signal_that_a_launcher_passes_on_twice_is_one(capsys):
    with cli.stop_requested(forwarded=True) as stopping:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        assert stopping()
    assert capsys.readouterr().err == "\nSIGTERM: finishing the current step\n"


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_help_answers_at_once_and_names_every_default(script):
    best = 9.0
    for _ in range(3):
        start = time.monotonic()
        result = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
        best = min(best, time.monotonic() - start)
    assert result.returncode == 0
    assert "(default:" in result.stdout
    assert best < 1.0


COMMANDS = [path.name for path in ROOT.glob("*.py")] + ["sae.report", "sae.export", "sae.look"]
# Flags that name a place on disk; a model's name may be one.
PLACES = r".*_path|.*(?<!text)_name|ssl_cert|explanations|metrics|out|samples|checkpoint"


@pytest.mark.parametrize("command", COMMANDS)
def test_what_no_command_knows_is_refused_in_the_same_words(command, monkeypatch, capsys):
    name = command.removesuffix(".py")
    module = importlib.import_module(f"{name}.__main__" if command == "sae.report" else name)
    words = {"sae.look": ["2", "--text", "x"], "train_autoencoder_from_tokens.py": ["2", "residual"]}
    monkeypatch.setattr(sys, "argv", [command, *words.get(command, ["2", "2"]), "--nope"])
    with pytest.raises(SystemExit, match="2"):
        module.parse_args()
    assert re.search(r"--help needed alone, more came: (2 |\.\.\. )?--nope\n", capsys.readouterr().err)


def parser_of(command):
    sys.path.insert(0, str(ROOT / "docs"))
    import write_flags

    return write_flags.parser_of(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_keeps_the_lines_of_its_commands_and_has_no_fragments(command):
    parser = parser_of(command)
    assert parser.description in parser.format_help()
    assert "(default: None)" not in parser.format_help()
    assert not [a.dest for a in parser._actions if (a.help or "").startswith(("of ", "than "))]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_for_a_place_knows_the_home_folder(command, monkeypatch):
    """bash leaves `--save_path=~/x` as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    places = [action for action in parser_of(command)._actions if re.fullmatch(PLACES, action.dest)]
    assert places
    for action in places:
        if (command, action.dest) != ("sae.export", "model_name"):  # a hub name alone
            assert action.type("~/x") == "/home/me/x", action.dest


def test_the_page_is_not_built_where_it_cannot_be_written(tmp_path):
    result = run_module("sae.report", tmp_path / "none.pt", "--out", tmp_path)
    assert_refused(result, "--out needs the name of a file", tmp_path, "is a folder")
