"""The last line of the demo: the page to open, and three of its features to look at first, and why.

python experiments/where_to_look.py demo/samples.explanations.jsonl demo/report.html
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sae.explanations import read_journal


def choose(documents):
    """[(why, document)]: the best, the one that knows most beyond counting, the worst; each once."""
    scored = [document for document in documents if document["score"] is not None]
    beyond = [document for document in scored if document.get("counting") is not None]
    found = []
    for why, among, worth in (
        ("the best explained", scored, lambda d: d["score"]),
        ("says most beyond counting", beyond, lambda d: d["score"] - d["counting"]),
        ("where it fails", scored, lambda d: -d["score"]),
    ):
        among = [document for document in among if document not in [taken for _, taken in found]]
        if among:
            found.append((why, max(among, key=worth)))
    return found


def main(journal, page):
    documents, _ = read_journal(journal)
    for why, document in choose(documents.values()):
        figures = ", ".join(
            f"{name} {document[name]:.2f}"
            for name in ("score", "control", "counting")
            if document.get(name) is not None
        )
        print(f"  feature {document['dim']}: {document['interpretation']} ({figures}): {why}")
    links = ", ".join(f"#f{document['dim']}" for _, document in choose(documents.values()))
    print(f"open {page} in a browser and look at {links} first")


if __name__ == "__main__":
    main(*sys.argv[1:])
