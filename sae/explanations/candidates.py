"""Explanations from several hands: one that counts, and an LLM that reads marked text or lines of numbers.

Counting knows tokens and their neighbours. What it found is written as a sentence in the grammar that
`simulation` reads: parts between semicolons, each a WHAT, or a WHAT after or before a neighbour. Tokens are
as `prompts.typed` writes them, contexts and their activations are those of `evidence`.
"""

import random
import re
from collections import Counter
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from sae.explanations import prompts
from sae.explanations.evidence import evenly
from sae.explanations.prompts import typed

HANDS = ("text", "counted", "lines")  # in this order, as many as are asked for; then text and lines in turn
LEAST_GAIN, MOST_PARTS, MOST_TRIED = 0.015, 6, 100
EXCERPTS, EXCERPT_TOKENS = 12, 16
LINE_CONTEXTS, LINE_TOKENS = 4, 20  # lines are long: six times the tokens of the same text
# Words of nearly every explanation.
COMMON = {
    "", "the", "a", "an", "and", "or", "of", "on", "in", "to", "that", "which", "is", "are", "such", "as",
    "for", "with", "after", "before", "line", "word", "token", "keyword", "name", "feature", "fire",
}  # fmt: skip
SPELT = {"\\n": "new lines", "\\t": "tabs", "space": "spaces"}


class Part(NamedTuple):
    """Tokens as `typed`: those of text `token` (None: any), where a side is given beside a neighbour."""

    token: str | None
    side: str | None = None  # after, before, or in a line after
    neighbour: str | None = None

    def holds(self, tokens):
        """Where in the Tokens of some contexts such a one stands, [C, T] of 0 and 1."""
        beside_CT = tokens.beside(tokens.are(self.neighbour), self.side)
        return beside_CT if self.token is None else beside_CT * tokens.are(self.token)


class Tokens:
    """Which of the distinct `texts` (as `typed`) stands where in contexts, each a list of as many texts."""

    def __init__(self, contexts):
        self.texts = list(dict.fromkeys(text for texts in contexts for text in texts))
        self.typed = list(map(typed, self.texts))
        place = {text: u for u, text in enumerate(self.texts)}
        self._at_CT = torch.tensor([[place[text] for text in texts] for texts in contexts])
        self._line_CT = self.are("\\n").cumsum(-1)

    def each(self, values_U):
        """A value of each distinct text, where it stands: [C, T] float32."""
        return torch.as_tensor(values_U, dtype=torch.float32)[self._at_CT]

    def are(self, token):
        """Where the `typed` token stands, [C, T] of 0 and 1."""
        return self.each([text == token for text in self.typed])

    def beside(self, values_CT, side):
        """For each token the value, 0 to 1, of the token that stands at its `side`; 1 without a side.

        "in a line after": the largest value of those that stand before it in its line.
        """
        if side == "after":
            return pad(values_CT[:, :-1], (1, 0))
        if side == "before":
            return pad(values_CT[:, 1:], (0, 1))
        if side is None:
            return torch.ones_like(values_CT)
        lift_CT = 2 * self._line_CT  # nothing of an earlier line is larger than anything of this one
        ends_CT = self.are("\\n")
        largest_CT = (values_CT * (1 - ends_CT) + lift_CT).cummax(-1).values
        return (pad(largest_CT[:, :-1], (1, 0)) - lift_CT).clamp_min(0)


def _parts(contexts_tokens, values_CT):
    """The MOST_TRIED Parts that hold most of the activation."""
    mass = Counter()
    for tokens, values in zip(contexts_tokens, values_CT.tolist(), strict=True):
        line = set()
        for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
            if value > 0:
                sides = [("after", tokens[i - 1])] if i else []
                sides += [("before", tokens[i + 1])] if i + 1 < len(tokens) else []
                some = [Part(who, *side) for side in sides for who in (token, None)]
                some += [Part(None, "in a line after", earlier) for earlier in sorted(line)]
                mass.update(dict.fromkeys([Part(token), *some], value))
            line = set() if token == "\\n" else line | {token}
    return [part for part, _ in mass.most_common(MOST_TRIED)]


def count(contexts):
    """The few Parts that tell best where the feature fires in `contexts`, the one that says most first.

    Each next one is that whose tokens, added to those before, raise the correlation with the activation
    most; one with a neighbour has to raise it by half as much again as a token alone.
    """
    tokens = Tokens([context.texts for context in contexts])
    values_CT = torch.stack([context.values_T for context in contexts])
    found = _parts([[typed(text) for text in context.texts] for context in contexts], values_CT)
    if not found:
        return []
    holds_PN = torch.stack([part.holds(tokens).flatten() for part in found]).double()
    harder = [1.5 if part.side else 1 for part in found]
    chosen, so_far_N, score = [], torch.zeros_like(holds_PN[0]), 0.0
    while len(chosen) < MOST_PARTS:
        scores = _correlations(torch.maximum(so_far_N, holds_PN), values_CT.flatten().double())
        gains = [(new - score) / times for new, times in zip(scores, harder, strict=True)]
        best = max(range(len(found)), key=gains.__getitem__)
        if gains[best] < LEAST_GAIN:
            break
        chosen.append(found[best])
        so_far_N, score = torch.maximum(so_far_N, holds_PN[best]), scores[best]
    return chosen


def _correlations(x_PN, y_N):
    """Pearson's of each row with y, 0 where it is constant; rounded, so that equal rows have equal ones."""
    x_PN, y_N = x_PN - x_PN.mean(1, keepdim=True), y_N - y_N.mean()
    return (x_PN @ y_N / (x_PN.norm(dim=1) * y_N.norm())).nan_to_num(0.0).round(decimals=9).tolist()


def counted(contexts):
    """The explanation that counting gives, "" where it finds nothing.

    "the word try", "the words return and raise; the tokens `(` and `[`", "self before `.`",
    "the token after def", "new lines".
    """
    groups = {}
    for part in count(contexts) if contexts else []:
        kind = "new lines" if part.token in SPELT else "word" if (part.token or "").isalnum() else "token"
        groups.setdefault(part if part.side else kind, []).append(_name(part.token))
    return "; ".join(_said(group, names) for group, names in groups.items())


def _name(token):
    """A token in a sentence: words as they are; all else, and words of the grammar, in backticks."""
    if token is None:
        return "the token"
    plain = token.isalnum() and token not in ("after", "before", "in", "and")
    return SPELT.get(token) or (token if plain else f"`{token}`")


def _said(group, names):
    if isinstance(group, Part):
        return f"{names[0]} {group.side} {_name(group.neighbour)}"
    *most, last = names
    listed = f"{', '.join(most)} and {last}" if most else last
    return listed if group == "new lines" else f"the {group}{'s' if most else ''} {listed}"


def meaning(explanation):
    """The words and tokens of an explanation that say something, in lower case, in the singular."""
    found = re.findall(r"`([^`]+)`|(\w+|[^\w\s`'\",.;:])", explanation.lower())
    return {code or word.removesuffix("s") for code, word in found} - COMMON


def cleaned(explanation, tokens):
    """An LLM's sentence without the repetitions in a list; "" where it turns in circles or copies an example.

    It copies one when it says all that the example's explanation says, and none of that is among the `tokens`
    (typed) on which the feature fires.
    """
    items = re.split(r"(?:,| and) ", explanation)
    if len(set(items)) < len(items):
        explanation = ", ".join(dict.fromkeys(items)).rstrip("`\"', ")
    if prompts.CIRCLE.search(explanation):
        return ""
    own = {token.lower().removesuffix("s") for token in tokens}
    shots = [meaning(shot[0]) for shot in (*prompts.SHOTS, *prompts.EXCERPT_SHOTS)]
    said = meaning(explanation)
    return "" if any(shot <= said and not shot & own for shot in shots) else explanation.strip()


def questions(feature, count, seed):
    """What the LLM is asked of a feature for `count` explanations: [(hand, question)].

    Each hand first sees contexts spread evenly over those shown, strongest first; later a random half.
    """
    hands = [*HANDS[:count], *(("text", "lines")[i % 2] for i in range(count - len(HANDS)))]
    rng, asked = random.Random(f"{seed} {feature.dim}"), []
    for number, hand in enumerate(hands):
        shown = feature.shown
        if number >= len(HANDS):
            shown = sorted(rng.sample(shown, (len(shown) + 1) // 2), key=shown.index)
        if shown and hand != "counted":
            asked.append(
                (hand, excerpts(shown) if hand == "text" else numbers(shown, feature.max_activation))
            )
    return asked


def excerpts(contexts):
    """The question of the hand that reads text: marked excerpts, and how often the tokens fired."""
    pieces = [context.around_peak(EXCERPT_TOKENS) for context in evenly(contexts, EXCERPTS)]
    fired, seen, mass = Counter(), Counter(), Counter()
    for context in contexts:
        for token, value in zip(map(typed, context.texts), context.values_T.tolist(), strict=True):
            seen[token] += 1
            fired[token] += value > 0
            mass[token] += value
    counts = ", ".join(f"{token} {fired[token]} of {seen[token]}" for token, _ in mass.most_common(6))
    marked = [prompts.excerpt(piece.texts, (piece.values_T > 0).tolist()) for piece in pieces]
    return prompts.excerpt_question(marked, counts)


def numbers(contexts, maximum):
    """The question of the hand that reads token<tab>activation lines."""
    pieces = [context.around_peak(LINE_TOKENS) for context in evenly(contexts, LINE_CONTEXTS)]
    values = [prompts.scaled(piece.values_T.tolist(), maximum, prompts.EXPLAIN_TOP) for piece in pieces]
    return prompts.explain_question([(p.visible(), some) for p, some in zip(pieces, values, strict=True)])
