"""Write the tables of flags in docs/ from the scripts' own parsers: `python docs/write_flags.py`.

A table stands between `<!-- flags: SCRIPT -->` and `<!-- end of flags -->`; SCRIPT is a file beside the
README, or a module such as sae.report. With --check nothing is written: status 1 where a table is old.
"""

import argparse
import importlib
import sys
from pathlib import Path
from unittest import mock

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
BEGIN, END = "<!-- flags: ", "<!-- end of flags -->"


class Found(Exception):
    """Carries the parser out of the function that would go on to parse."""


def parser_of(script):
    """The argparse parser of a script, as its `parse_args` builds it."""
    name = script.removesuffix(".py")
    if not script.endswith(".py") and (DOCS.parent / name.replace(".", "/") / "__main__.py").exists():
        name += ".__main__"
    module = importlib.import_module(name)

    def stop(parser, *_args, **_options):
        raise Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        try:
            module.parse_args()
        except Found as found:
            return found.args[0]
    raise AssertionError(f"{script} has no parse_args() that parses")


def default_of(action):
    if not action.option_strings:
        return ""
    if isinstance(action, argparse.BooleanOptionalAction):
        return {None: "", True: "on", False: "off"}[action.default]
    if action.nargs == 0:
        return "off"
    if action.default is None:
        return ""
    values = action.default if isinstance(action.default, list) else [action.default]
    return " ".join(f"`{value}`" for value in values)


def table(parser):
    """The parser's flags as Markdown, in their order."""
    rows = ["| flag | default | |", "|---|---|---|"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        names = action.option_strings or [action.dest]
        said = (action.help or "").replace("|", "\\|").replace("%%", "%")
        if action.choices:
            said += f" ({', '.join(map(str, action.choices))})"
        rows.append(f"| {' '.join(f'`{name}`' for name in names)} | {default_of(action)} | {said} |")
    return "\n".join(rows)


def renewed(text):
    """A page with every table in it written anew."""
    head, *parts = text.split(BEGIN)
    for part in parts:
        script, _, rest = part.partition(" -->\n")
        _, closed, rest = rest.partition(END)
        assert closed, f"no {END} behind the flags of {script}"
        head += f"{BEGIN}{script} -->\n{table(parser_of(script))}\n{END}{rest}"
    return head


def main():
    old = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        if renewed(text) != text:
            old.append(page.name)
            if "--check" not in sys.argv[1:]:
                page.write_text(renewed(text))
    print(f"{'old' if '--check' in sys.argv[1:] else 'written'}: {', '.join(old) or 'nothing'}")
    return int(bool(old) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
