"""From a feature's contexts to its document: the hands write, the judges choose, score and control measure.

What a document says depends on the feature, the samples and the Settings alone: a feature's control is found
by its place in the samples file, and is explained for the purpose where the run does not explain it anyway.
"""

from datetime import UTC, datetime
from typing import NamedTuple

from sae.explanations import candidates as hands
from sae.explanations import prompts, scoring
from sae.explanations.evidence import fired_on

# Scores on the judging contexts: from the first on counting leaves nothing to be asked, and it is below the
# second that lines, which are long, judge what token readings do not see.
ENOUGH, FAINT = 0.8, 0.1
RULES = 3  # to be raised where the same settings come to make other documents: one journal holds one kind
MOST_CONTROLS = 20  # other features among which one looks for its control


class Settings(NamedTuple):
    """What beside samples and LLMs decides the documents, named after the script's flags."""

    simulation: str = "contrastive"
    num_interpretation_samples: int = 20
    num_simulation_samples: int = 10
    num_explanations: int = 3
    context_tokens: int = 64
    scores: str = "all"  # or simulation: no detection, no fuzzing
    batch_size: int = 16  # features that are explained together
    seed: int = 0

    def words(self, **more):
        """In words, for the journal: `simulation` is a field of its own there, batches decide nothing."""
        said = {"rules": RULES} | self._asdict() | more
        return " ".join(f"{name}={said[name]}" for name in said if name not in ("simulation", "batch_size"))


class Explained(NamedTuple):
    feature: object  # evidence.Feature
    interpretation: str  # "" by None where there was no sentence
    explained_by: str | None
    candidates: list  # what the document says of every sentence, the best first


class Explainer:
    """Explains and scores the features of a Plan. `interpreter` writes; `simulator` (a Simulator) reads.

    `progress(what, count)` is called whenever something is done: written, explained, scored.
    """

    def __init__(self, plan, interpreter, simulator, progress=lambda what, count=1: None):
        self.plan, self.settings = plan, plan.settings
        self._interpreter, self._simulate, self._progress = interpreter, simulator, progress
        self._explained = {}  # by place

    def tokens_read(self):
        """How many tokens the LLMs have read so far."""
        return sum(reader.tokens_read for reader in {self._interpreter, self._simulate.interpreter})

    def group(self, places):
        """The part of each feature's document that is new, for the features at `places`: a list of dicts."""
        self._explained = {}
        self._simulate.forget()
        self.explain(sorted({*places, *(other for place in places for other in self.plan.others(place)[:1])}))
        documents = []
        for place in places:
            documents.append(self._document(place))
            self._progress("scored")
        return documents

    def explain(self, places):
        """Make sure that the features at `places` are explained, the LLM writing for all of them together."""
        features = {place: self.plan.feature(place) for place in places if place not in self._explained}
        found = {place: {} for place in features}  # sentence -> hand, score on the judging contexts

        def below(least):
            return [p for p in features if all((score or 0) < least for _, score in found[p].values())]

        if "counted" in hands.HANDS[: self.settings.num_explanations]:
            counts = [(place, "counted", hands.counted(one.shown)) for place, one in features.items()]
            self._judge(features, found, counts)
        self._judge(features, found, self._written({place: features[place] for place in below(ENOUGH)}))
        if self.settings.simulation == "contrastive":  # others read the same a second time
            faint = [(p, hand, text) for p in below(FAINT) for text, (hand, _) in found[p].items()]
            self._judge(features, found, faint, lines=True)
        for place, feature in features.items():
            said = [
                {"interpretation": text, "explained_by": hand, "judged": score}
                for text, (hand, score) in reversed(found[place].items())
            ]
            said.sort(key=lambda one: -2 if one["judged"] is None else one["judged"], reverse=True)
            best = said[0] if said else {"interpretation": "", "explained_by": None}
            self._explained[place] = Explained(feature, best["interpretation"], best["explained_by"], said)
            self._progress("explained")

    def _written(self, features):
        """[(place, hand, sentence)]: what the LLM writes about each."""
        count, seed = self.settings.num_explanations, self.settings.seed
        asked = [(place, *one) for place, f in features.items() for one in hands.questions(f, count, seed)]
        written = []
        for name, messages in (("text", prompts.excerpt_messages), ("lines", prompts.explain_messages)):
            mine = [(place, question) for place, hand, question in asked if hand == name]
            if not mine:
                continue
            sentences = self._interpreter.explanations(
                [question for _, question in mine],
                messages_about=messages,
                batch_size=self.settings.batch_size + 1,  # a group, and the control of its last feature
                progress=lambda count: self._progress("written", count),
            )
            for (place, _), text in zip(mine, sentences, strict=True):
                written.append((place, name, hands.cleaned(text, fired_on(features[place].shown))))
        return written

    def _judge(self, features, found, written, lines=False):
        """Add the sentences of `written` to what was `found`; one said twice is of the hand that came first.

        `lines`: judge again, and by lines too where the simulation does so.
        """
        self._simulate.read([text for *_, text in written if text])
        for place, hand, text in written:
            if text and (lines or text not in found[place]):
                score, contexts = None, features[place].judging
                if contexts and self.settings.num_explanations > 1:
                    values_CT = self._simulate(text, contexts, lines)
                    score = scoring.rounded(scoring.correlation(values_CT, scoring.truth(contexts)))
                found[place][text] = hand, score

    def _control(self, place):
        """The Explained of a feature whose explanation has no word in common with this one's, or None."""
        own = hands.meaning(self._explained[place].interpretation)
        for other in self.plan.others(place)[:MOST_CONTROLS]:
            self.explain([other])
            said = hands.meaning(self._explained[other].interpretation)
            if said and not said & own:
                return self._explained[other]
        return None

    def _document(self, place):
        feature, sentence, hand, candidates = self._explained[place]
        seed, contexts = self.settings.seed + feature.dim, feature.scored
        result = {
            "dim": feature.dim, "tokens": fired_on(contexts),
            "interpretation": sentence, "explained_by": hand, "candidates": candidates,
            "log10_frequency": round(feature.log10_frequency, 4),
            "max_activation": round(feature.max_activation, 4),
            "shown": [context.document() for context in feature.shown],
            "scored": [context.document() for context in contexts],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        } | self.plan.effects(place)  # fmt: skip
        if not sentence or not contexts:
            reason = "no explanation: there was no context to show where it fires, or no reply"
            if sentence:
                reason = "no context to score on: all are from documents the explanation saw"
            fields = ("score", "control", "counting")
            reasons = dict.fromkeys((f"{field}_reason" for field in fields), reason)
            return result | dict.fromkeys((*fields, "interval", "control_dim")) | reasons
        simulation_CT = self._simulate(sentence, contexts)
        result |= scoring.scored(simulation_CT, contexts, seed)
        result["simulated"] = [[round(value, 3) for value in row] for row in simulation_CT.tolist()]
        result |= scoring.compared("counting", scoring.looked_up(feature.shown, contexts), contexts)
        reason = f"none of {MOST_CONTROLS} other features has an explanation of other words"
        result |= {"control": None, "control_dim": None, "control_reason": reason}
        if control := self._control(place):
            other_CT = self._simulate(control.interpretation, contexts)
            result |= scoring.compared("control", other_CT, contexts)
            result["control_dim"] = control.feature.dim
        if self.settings.scores == "all":
            result |= scoring.yes_no(feature, sentence, self._simulate.yes, seed)
        return result
