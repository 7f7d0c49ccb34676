"""The pages under docs/: flag tables as the parsers have them, links and files that are there."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_flag_tables_are_those_of_the_parsers():
    command = [sys.executable, ROOT / "docs" / "write_flags.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}{result.stderr}: run python docs/write_flags.py"


def test_a_changed_default_makes_a_table_old():
    sys.path.insert(0, str(ROOT / "docs"))
    import write_flags

    page = "before\n<!-- flags: train_autoencoder_from_tokens.py -->\nold\n<!-- end of flags -->\nafter\n"
    new = write_flags.renewed(page)
    assert new.startswith("before\n<!-- flags") and new.endswith("<!-- end of flags -->\nafter\n")
    assert "| `--learning_rate` | `0.0001` |" in new and "\nold\n" not in new
    assert write_flags.renewed(new) == new != write_flags.renewed(new).replace("0.0001", "0.0002")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    anchors = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
               for line in text.splitlines() if line.startswith("#")}  # fmt: skip
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        assert not file or (page.parent / file).exists(), target
        assert file or not anchor or anchor in anchors, target
