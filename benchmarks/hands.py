"""What each hand's explanations are worth alone, and the one that is kept of all, on the same features.

    python benchmarks/hands.py --samples demo/samples.pt --dataset demo/tokens --autoencoder demo/run/N.pt

Every hand explains every feature; what it said is simulated by the token reading on the scored contexts,
and so is what it said of the feature before, as a control. Counting without a sentence, a look-up, stands
beside them.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from sae import explanations, models  # noqa: E402
from sae.explanations import candidates, prompts, scoring  # noqa: E402
from sae.explanations.evidence import fired_on  # noqa: E402

HANDS = candidates.HANDS


def sentences(features, interpreter, hand):
    """One by this hand for each feature."""
    if hand == "counted":
        return [candidates.counted(feature.shown) for feature in features]
    asked = [dict(candidates.questions(feature, len(HANDS), 0))[hand] for feature in features]
    messages = prompts.excerpt_messages if hand == "text" else prompts.explain_messages
    written = interpreter.explanations(asked, messages_about=messages, batch_size=8)
    return [
        candidates.cleaned(text, fired_on(feature.shown))
        for feature, text in zip(features, written, strict=True)
    ]


def correlations(features, texts, simulate):
    """Of what each text simulates with what the feature does; 0 where nothing was said or simulated."""
    scores = []
    for feature, text in zip(features, texts, strict=True):
        values_CT = simulate(text, feature.scored, False) if text else None
        truth_CT = scoring.truth(feature.scored)
        scores.append((scoring.correlation(values_CT, truth_CT) if text else None) or 0.0)
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name in ("--samples", "--dataset", "--autoencoder"):
        parser.add_argument(name, required=True)
    parser.add_argument("--model", default=str(ROOT / "inputs/smollm2"), help="LLM that explains")
    parser.add_argument("--features", type=int, default=30, help="the first so many")
    args = parser.parse_args()
    material = explanations.open_material(args.samples, args.dataset, args.autoencoder)
    plan = explanations.Plan(material, explanations.Settings(simulation="tokens"), (), args.features)
    tokenizer = models.load_tokenizer(args.model)
    interpreter = explanations.Interpreter(models.load_model(args.model), tokenizer)
    simulate = explanations.Simulator(interpreter, "tokens")
    explainer = explanations.Explainer(plan, interpreter, simulate)
    features = [plan.feature(place) for group in plan.groups for place in group]
    texts = {hand: sentences(features, interpreter, hand) for hand in HANDS}
    documents = [document for group in plan.groups for document in explainer.group(group)]
    texts["kept"] = [document["interpretation"] for document in documents]
    scores = {name: correlations(features, some, simulate) for name, some in texts.items()}
    scores["counting, no sentence"] = [document["counting"] or 0.0 for document in documents]
    print("| | median score | at least 0.5 | control (of the feature before) |\n|---|---|---|---|")
    for name, own in scores.items():
        some = texts.get(name)
        other = correlations(features, some[-1:] + some[:-1], simulate) if some else own[:0]
        control = f"{statistics.median(other):.2f}" if other else ""
        good = sum(score >= 0.5 for score in own) / len(own)
        print(f"| {name} | {statistics.median(own):.2f} | {good:.0%} | {control} |", flush=True)
    for feature, *said in zip(features, *texts.values(), strict=True):
        print(feature.dim, *said, sep=" | ")


if __name__ == "__main__":
    main()
