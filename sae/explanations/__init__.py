"""Evidence -> explanation, score, document: the interpreter, the journal, ElasticSearch."""

from sae.explanations.elastic import Writer, connect, ensure_index, index_name, missing, search
from sae.explanations.evidence import Plan, open_material
from sae.explanations.explain import explained, summary
from sae.explanations.interpreter import Interpreter, check_interpreter
from sae.explanations.journal import Journal, check_journal, read_journal
from sae.explanations.prompts import token_texts

__all__ = [
    "Interpreter", "Journal", "Plan", "Writer", "check_interpreter", "check_journal", "connect",
    "ensure_index", "explained", "index_name", "missing", "open_material", "read_journal", "search",
    "summary", "token_texts",
]  # fmt: skip
