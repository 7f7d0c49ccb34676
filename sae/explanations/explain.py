"""Explain features, simulate them from the explanation alone, and score that against the truth.

Bills et al. 2023. Dims: C contexts, T looked-at tokens of one, d the ten digits.
"""

import statistics
from datetime import UTC, datetime

import torch

from sae.explanations import prompts
from sae.explanations.evidence import selections

STEEPNESS, THRESHOLD = 2.0, 4.0  # of `simulated`; benchmarks/simulation.py makes the table behind them
BOOTSTRAPS = 1000


def summary(documents, new, seconds):
    """One line: features done, median score and control, share of scores that beat their control, speed.

    `new` of the documents were made in this run's `seconds`.
    """
    scores = [doc["score"] for doc in documents if doc["score"] is not None]
    both = [doc for doc in documents if None not in (doc["score"], doc["control"])]
    figures = f"median score {statistics.median(scores):.2f}" if scores else "no score is defined"
    if both:
        control = statistics.median(doc["control"] for doc in both)
        share = sum(doc["score"] > doc["control"] for doc in both) / len(both)
        figures += f", median control {control:.2f}, {share:.0%} beat their control"
    rate = f"{new} in {seconds:.0f} s, {60 * new / max(seconds, 1e-9):.1f} features/minute"
    return f"{len(documents)} features explained: {figures}; {rate}"


class NeutralReadings:
    """Readings of contexts under the neutral explanation, each made once, whatever features share it.

    `rows_of_groups`: for every group of features the dataset rows it needs. All rows that a group is the
    first to need are read together, so that a reading never depends on what was read before.
    """

    def __init__(self, interpreter, rows_of_groups, visible_of, batch_size):
        self._interpreter, self._visible_of, self._batch_size = interpreter, visible_of, batch_size
        self._home, self._members, self._readings = {}, [], {}
        for group, rows in enumerate(rows_of_groups):
            self._members.append([row for row in dict.fromkeys(rows) if row not in self._home])
            self._home |= dict.fromkeys(self._members[-1], group)

    def __call__(self, rows):
        """log p of each digit, [C, T, 10]."""
        for group in sorted({self._home[row] for row in rows if row not in self._readings}):
            members = self._members[group]
            visible = [self._visible_of(row) for row in members]
            readings = self._interpreter.readings(prompts.NEUTRAL, visible, self._batch_size)
            self._readings |= dict(zip(members, readings, strict=True))
        return torch.stack([self._readings[row] for row in rows])


def simulated(log_p_CTd, neutral_CTd=None):
    """Simulated activations [C, T] from the digits' log probabilities; their scale means nothing.

    Without `neutral`: the expected digit (Bills et al.). With it: how much more the explanation makes a
    non-zero digit likely than the neutral one does, so that a token's own pull cancels.
    """
    if neutral_CTd is None:
        return log_p_CTd.exp() @ torch.arange(10.0)
    odds_CT = _log_odds(log_p_CTd) - _log_odds(neutral_CTd)
    return torch.sigmoid(STEEPNESS * odds_CT - THRESHOLD)


def _log_odds(log_p_CTd):
    """Of a non-zero digit."""
    return log_p_CTd[..., 1:].logsumexp(-1) - log_p_CTd[..., 0]


def correlation(x, y):
    """Pearson's, over all elements in float64; None where either side is constant."""
    x, y = x.double().flatten(), y.double().flatten()
    if not len(x) or x.min() == x.max() or y.min() == y.max():
        return None
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x.norm() * y.norm())).clamp(-1, 1).item()


def interval(x_CT, y_CT, seed):
    """Bootstrap 95% interval [lo, hi] of `correlation`, contexts drawn with replacement; None if undefined.

    Draws in which either side is constant have no correlation and are left out.
    """
    x_CT, y_CT = x_CT.double() - x_CT.double().mean(), y_CT.double() - y_CT.double().mean()
    sums = [torch.ones_like(x_CT), x_CT, y_CT, x_CT * x_CT, y_CT * y_CT, x_CT * y_CT]
    sums_C6 = torch.stack([part.sum(1) for part in sums], 1)
    rng = torch.Generator().manual_seed(seed)
    drawn_NC = torch.randint(len(x_CT), (BOOTSTRAPS, len(x_CT)), generator=rng)
    n, x, y, xx, yy, xy = sums_C6[drawn_NC].sum(1).unbind(1)
    spread = (n * xx - x * x).clamp_min(0) * (n * yy - y * y).clamp_min(0)
    defined = spread > 1e-12 * (n * xx) * (n * yy)
    if not defined.any():
        return None
    drawn = ((n * xy - x * y) / spread.sqrt())[defined].clamp(-1, 1)
    return drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()


def explain_group(
    features, interpreter, neutral=None, num_shown=3, num_explanations=1, batch_size=16, seed=0
):
    """Explain and score the Features of one group: a list of dicts, the part of each document that is new.

    `neutral`: NeutralReadings, None for the expected value. Each feature's control is the explanation of the
    next one in the group (in a circle) that has another explanation.
    """
    candidates = _candidates(features, interpreter, num_shown, num_explanations, batch_size, seed)
    kept = []
    for feature, texts in zip(features, candidates, strict=True):
        best = texts[0] if texts else ""
        if len(texts) > 1 and feature.judging:
            truth_CT = torch.stack([context.values_T for context in feature.judging])
            scores = []
            for text in texts:
                simulation_CT = _simulate(text, feature.judging, interpreter, neutral, batch_size)
                score = correlation(simulation_CT, truth_CT)
                scores.append(-2 if score is None else score)
            best = texts[scores.index(max(scores))]
        kept.append(best)
    controls = [_control(kept, place) for place in range(len(features))]
    # One pass per explanation over all contexts it is needed for: its own, and those it is the control of.
    needed = [[*feature.scored] for feature in features]
    for place, control in enumerate(controls):
        if control is not None:
            needed[control] += features[place].scored
    by_row = []
    for text, contexts in zip(kept, needed, strict=True):
        distinct = list({context.row: context for context in contexts}.values())
        simulation = []
        if text and distinct:
            simulation = _simulate(text, distinct, interpreter, neutral, batch_size)
        by_row.append({context.row: values for context, values in zip(distinct, simulation, strict=False)})
    results = []
    for place, (feature, control) in enumerate(zip(features, controls, strict=True)):
        result = {
            "dim": feature.dim,
            "tokens": fired_on(feature.scored),
            "interpretation": kept[place],
            "log10_frequency": round(feature.log10_frequency, 4),
            "max_activation": round(feature.max_activation, 4),
        }
        own = _score(feature, kept[place], by_row[place], seed)
        other = {"score": None, "score_reason": "no other feature explained with it has another explanation"}
        if control is not None:
            other = _score(feature, kept[control], by_row[control], seed)
        examples = [*feature.shown[:num_shown], *feature.scored]
        results.append(
            result
            | own
            | {
                "control": other["score"],
                "control_reason": other["score_reason"],
                "control_dim": None if control is None else features[control].dim,
                "examples": [
                    prompts.marked(context.texts, (context.values_T > 0).tolist())
                    for context in examples
                    if context.values_T.max() > 0
                ],
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
    return results


def fired_on(contexts):
    """The distinct tokens with an activation, strongest first, as people type them."""
    strongest = {}
    for context in contexts:
        for text, value in zip(context.texts, context.values_T.tolist(), strict=True):
            if value > 0:
                strongest[prompts.typed(text)] = max(value, strongest.get(prompts.typed(text), 0))
    return sorted(strongest, key=lambda text: -strongest[text])


def explained(plan, pending, processes, parallel, interpreter, simulation, num_shown, num_explanations, seed):
    """Explain the groups `pending` (numbers) of a Plan: for each round the documents' new part, in order.

    A round is one group, or with `parallel` "data" one for each process. All processes have to iterate.
    """
    share, shares = (processes.rank, processes.count) if parallel == "data" else (0, 1)
    batch_size = 2 * plan.group_size  # contexts: as many as a group has features, and as many controls
    neutral = None
    if simulation == "contrastive":
        neutral = NeutralReadings(interpreter, plan.rows_of_groups, plan.visible, batch_size)
    for first in range(0, len(pending), shares):
        results = []
        for number in pending[first : first + shares][share : share + 1]:
            features = [plan.feature(place) for place in plan.groups[number]]
            results = explain_group(
                features, interpreter, neutral, num_shown, num_explanations, batch_size, seed
            )
        everyones = processes.everyone(results if processes.rank < shares else [])
        yield [result for part in everyones for result in part]


def _candidates(features, interpreter, num_shown, num_explanations, batch_size, seed):
    """For each feature its distinct explanations; none where there was nothing to show."""
    asked = [
        (place, prompts.explain_question([_shown(context, feature.max_activation) for context in chosen]))
        for place, feature in enumerate(features)
        for chosen in selections(feature.shown, num_shown, num_explanations, f"{seed} {feature.dim}")
        if chosen
    ]
    found = [[] for _ in features]
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        for (place, _), text in zip(batch, interpreter.explanations([q for _, q in batch]), strict=True):
            if text and text not in found[place]:
                found[place].append(text)
    return found


def _shown(context, maximum):
    return context.visible(), prompts.scaled(context.values_T.tolist(), maximum, prompts.EXPLAIN_TOP)


def _simulate(text, contexts, interpreter, neutral, batch_size):
    readings = interpreter.readings(text, [context.visible() for context in contexts], batch_size)
    return simulated(readings, neutral([context.row for context in contexts]) if neutral else None)


def _control(kept, place):
    """The place of the next different explanation, None where there is none."""
    order = [(place + step) % len(kept) for step in range(1, len(kept))]
    return next((other for other in order if kept[other] and kept[other] != kept[place]), None)


def _score(feature, text, simulation_of_row, seed):
    """score, score_reason and interval of `feature` under the explanation that the simulation is from."""
    nothing = {"score": None, "interval": None}
    if not text:
        return nothing | {
            "score_reason": "no explanation: there was no context to show where it fires, or no reply"
        }
    if not feature.scored:
        return nothing | {
            "score_reason": "no context to score on: all are from documents the explanation saw"
        }
    truth_CT = torch.stack([context.values_T for context in feature.scored])
    simulation_CT = torch.stack([simulation_of_row[context.row] for context in feature.scored])
    score = correlation(simulation_CT, truth_CT)
    if score is None:
        constant = "the feature" if truth_CT.min() == truth_CT.max() else "the simulation"
        return nothing | {"score_reason": f"{constant} is constant over the scored contexts"}
    bounds = interval(simulation_CT, truth_CT, seed + feature.dim)
    return {
        "score": round(score, 4),
        "score_reason": None,
        "interval": bounds and [round(bound, 4) for bound in bounds],
    }
