"""Evidence -> explanation, score, document: hands, readings, the interpreter, the journal, ElasticSearch."""

from sae.explanations.elastic import Writer, connect, ensure_index, index_name, search
from sae.explanations.evidence import Plan, open_material
from sae.explanations.explain import Explainer, Settings
from sae.explanations.interpreter import Interpreter
from sae.explanations.journal import Journal, read_journal
from sae.explanations.prompts import token_texts
from sae.explanations.run import Bar, explained, forecast, load, prepare, summary
from sae.explanations.simulation import Simulator

__all__ = [
    "Bar", "Explainer", "Interpreter", "Journal", "Plan", "Settings", "Simulator", "Writer",
    "connect", "ensure_index", "explained", "forecast", "index_name", "load", "open_material", "prepare",
    "read_journal", "search", "summary", "token_texts",
]  # fmt: skip
