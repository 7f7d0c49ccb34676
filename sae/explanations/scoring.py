"""How well an explanation, or a table of tokens, tells where a feature fires. Dims: C contexts, T tokens."""

from collections import Counter

import torch

from sae.explanations import prompts

BOOTSTRAPS = 1000
YES_TOKENS = 32  # of each, around its peak, as delphi shows them
MOST_YES = 10  # contexts where the feature fires, and at least as many where not, that are asked about
FIRES = "Does it fire on a token of this text?"
MARKED = "Are the tokens between « and » in this text those on which it fires?"


def correlation(x, y):
    """Pearson's, over all elements in float64; None where either side is constant."""
    x, y = x.double().flatten(), y.double().flatten()
    if not len(x) or x.min() == x.max() or y.min() == y.max():
        return None
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x.norm() * y.norm())).clamp(-1, 1).item()


def interval(x_CT, y_CT, seed):
    """Percentiles 2.5 and 97.5 of `correlation` over contexts drawn with replacement; None if undefined.

    Of few contexts it covers less than 95%: docs/explain.md has what it covered. Draws in which either side
    is constant have no correlation and are left out.
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


def looked_up(shown, contexts):
    """What counting simulates, [C, T]: each token's mean activation in the contexts `shown`, 0 if unseen."""
    total, seen = Counter(), Counter()
    for context in shown:
        seen.update(context.texts)
        for text, value in zip(context.texts, context.values_T.tolist(), strict=True):
            total[text] += value
    return torch.tensor([[total[text] / max(1, seen[text]) for text in c.texts] for c in contexts])


def truth(contexts):
    """The activations of contexts, [C, T]."""
    return torch.stack([context.values_T for context in contexts])


def rounded(value):
    return None if value is None else round(value, 4)


def compared(name, simulation_CT, contexts):
    """The fields `name` and `name`_reason of a simulation, beside the truth of the contexts."""
    truth_CT = truth(contexts)
    value = correlation(simulation_CT, truth_CT)
    side = "the feature" if truth_CT.min() == truth_CT.max() else "the simulation"
    reason = f"{side} is constant over the scored contexts" if value is None else None
    return {name: rounded(value), f"{name}_reason": reason}


def scored(simulation_CT, contexts, seed):
    """The fields score, score_reason and interval."""
    fields = compared("score", simulation_CT, contexts)
    bounds = None if fields["score"] is None else interval(simulation_CT, truth(contexts), seed)
    return fields | {"interval": bounds and [rounded(bound) for bound in bounds]}


def auroc(positive, negative):
    """How often a value of `positive` is above one of `negative`, ties counting half (Mann and Whitney)."""
    over = positive[:, None] - negative[None]
    return ((over > 0).double() + (over == 0).double() / 2).mean().item()


def yes_no(feature, explanation, yes, seed):
    """The fields detection and fuzzing (delphi's, arXiv 2410.13928): AUROC of the log odds of yes over no.

    Detection: texts where the feature fires against those where it is silent, hard ones first. Fuzzing:
    right marks against as many marks drawn among the silent tokens of the same text.
    `yes(explanation, question, texts)` gives log odds.
    """
    firing = [context for context in feature.scored if context.values_T.max() > 0][:MOST_YES]
    silent = feature.hard + [context for context in feature.scored if context.values_T.max() == 0]
    silent = [context.around_peak(YES_TOKENS) for context in silent[: max(MOST_YES, len(firing))]]
    firing = [context.around_peak(YES_TOKENS) for context in firing]
    rng = torch.Generator().manual_seed(seed)
    right, wrong = [context.values_T > 0 for context in firing], []
    for on_T in right:
        places = (~on_T).nonzero()[:, 0]
        places = places[torch.randperm(len(places), generator=rng)[: int(on_T.sum())]]
        wrong.append(torch.zeros_like(on_T).index_fill(0, places, True))
    pairs = zip(firing + firing, right + wrong, strict=True)
    marked = [prompts.excerpt(context.texts, on_T.tolist()) for context, on_T in pairs]
    plain, fields = ["".join(context.texts) for context in firing + silent], {}
    for name, question, texts in (("detection", FIRES, plain), ("fuzzing", MARKED, marked)):
        counts, value, reason = (len(firing), len(texts) - len(firing)), None, None
        if min(counts) < MOST_YES:
            needed = f"{MOST_YES} contexts where the feature fires and as many others needed"
            reason = f"{needed}, there are {counts[0]} and {counts[1]}"
        else:
            value = rounded(auroc(*yes(explanation, question, texts).split(counts)))
        fields |= {name: value, f"{name}_reason": reason}
    return fields
