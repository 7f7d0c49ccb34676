"""An explaining run: what has to be there before any weights are read, the loop, the bar, the last line."""

import statistics
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from sae import processes
from sae.explanations import elastic, journal
from sae.explanations.candidates import HANDS
from sae.explanations.evidence import Plan, open_material
from sae.explanations.explain import Explainer, Settings
from sae.explanations.interpreter import Interpreter, check_interpreter
from sae.explanations.simulation import Simulator


class Work(NamedTuple):
    """What a run has to do; the last four are the first process's alone."""

    plan: Plan
    path: Path  # of the journal
    origin: dict  # the fields that all documents share
    documents: dict  # of the journal, by feature
    client: object = None
    index: str = ""
    lacking: tuple = ()  # documents that the server has not

    def new(self, results):
        """The documents of `results` that the journal does not hold."""
        return [self.origin | result for result in results if result["dim"] not in self.documents]


def prepare(here, **flags):
    """The Work of the script's `flags`; in the first process after all that can be refused was looked at."""
    from sae import models

    samples_path = flags["interpretation_samples_path"]
    path = Path(samples_path).with_suffix(".explanations.jsonl")
    settings = Settings(**{name: flags[name] for name in Settings._fields})
    material = open_material(samples_path, flags["dataset_path"], flags["autoencoder_path"])
    plan = Plan(material, settings, flags["features"] or (), flags["max_features"])
    dtype = str(models.pick_dtype(flags["dtype"], here.device)).removeprefix("torch.")
    name, simulator = flags["interpretation_model_name"], flags["simulation_model_name"]
    words = settings.words(dtype=dtype, **{"simulation_model": simulator} if simulator else {})
    origin = material.origin(name, settings.simulation, words)
    if here.rank:
        return Work(plan, path, origin, {})
    trust = flags["trust_remote_code"]
    for reader in filter(None, (name, simulator)):
        skeleton = models.skeleton(reader, flags["dtype"], trust)
        check_interpreter(skeleton, models.load_tokenizer(reader, trust))
    if flags["dry_run"]:
        return Work(plan, path, origin, {})
    documents, torn = journal.read_journal(path)
    journal.check_journal(documents, origin, path)
    client = elastic.connect(flags["server_address"], flags["api_key"], flags["ssl_cert"], flags["insecure"])
    index = flags["index"] or elastic.index_name(material.samples.config)
    elastic.ensure_index(client, index, origin)
    lacking = elastic.missing(client, index, documents.values())
    dropped = ", a torn last line dropped" if torn else ""
    print(f"{path}: {len(documents)} features done{dropped}; {index} lacks {len(lacking)}", flush=True)
    return Work(plan, path, origin, documents, client, index, lacking)


def load(here, plan, bar, **flags):
    """The Explainer of the Plan, its LLMs read; in each process its share of them."""
    from sae import models

    def read(name):
        trust = flags["trust_remote_code"]
        model = processes.load_model(here, name, flags["dtype"], flags["parallel"], trust)
        return Interpreter(model, models.load_tokenizer(name, trust))

    interpreter = read(flags["interpretation_model_name"])
    reader = read(flags["simulation_model_name"]) if flags["simulation_model_name"] else interpreter
    simulator = Simulator(reader, flags["simulation"], progress=lambda count: bar.step("read", count))
    return Explainer(plan, interpreter, simulator, bar.step)


def explained(plan, pending, here, parallel, explainer, stopping):
    """Explain the groups `pending` (numbers) of a Plan: yields at the first process the documents' new part.

    All processes have to iterate. They work on the same group, or with `parallel` "data" each on one of its
    own whenever it is free; once one is `stopping()`, what was begun is the last.
    """

    def work(number):
        return explainer.group(plan.groups[number])

    if parallel == "data" and here.count > 1:
        yield from here.hand_out(pending, work, stopping)
        return
    for number in pending:
        results = work(number)
        if here.rank == 0:
            yield results
        if any(here.everyone(stopping())):
            return


class Bar(tqdm):
    """Features done; it moves with every explanation that is written and every score."""

    def __init__(self, plan, pending, shown):
        times = "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        form = "{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total} features " + times
        written = plan.settings.num_explanations - (plan.settings.num_explanations > 1)  # counting writes one
        # Of the work on a feature, roughly.
        self._shares = {"written": 0.5 / written, "explained": 0.2, "scored": 0.3}
        self._reached = plan.count - sum(len(plan.groups[number]) for number in pending)
        self._since, self._most = Counter(), plan.settings.batch_size
        start = {"total": plan.count, "initial": self._reached}
        super().__init__(unit="feature", bar_format=form, disable=not shown, **start)

    def step(self, what, count=1):
        """`count` more of what a group of features takes: written, read, explained, scored."""
        self._since[what] += count
        self.set_postfix(self._since, refresh=False)
        done = min(self._most, sum(share * self._since[name] for name, share in self._shares.items()))
        self.update(max(0, min(self._reached + done, self.total) - self.n))

    def reach(self, count):
        """`count` more features are done."""
        self._reached += count
        self._since.clear()
        self.update(self._reached - self.n)


def forecast(plan, explainer):
    """One line: what all features of the samples would take, by what a first group takes."""
    started, features = time.monotonic(), len(plan.groups[0])
    explainer.group(plan.groups[0])
    seconds, tokens = time.monotonic() - started, explainer.tokens_read()
    hours, millions = plan.count / features * seconds / 3600, plan.count / features * tokens / 1e6
    return (
        f"{features} features took {tokens / features:,.0f} tokens and {seconds / features:.1f} s each: "
        f"{plan.count:,} would take {millions:,.1f} million tokens and {hours:,.1f} hours"
    )


def summary(documents, new, seconds):
    """One line: features, median score and control, what beats its control by more than its interval, hands.

    `new` of the documents were made in this run's `seconds`.
    """
    documents = list(documents)
    scores = [doc["score"] for doc in documents if doc["score"] is not None]
    both = [doc for doc in documents if None not in (doc["score"], doc["control"])]
    figures = f"median score {statistics.median(scores):.2f}" if scores else "no score is defined"
    if both:
        control = statistics.median(doc["control"] for doc in both)
        clear = [doc for doc in both if doc["interval"] and doc["interval"][0] > doc["control"]]
        beat = [doc for doc in both if doc["score"] > doc["control"]]
        figures += f", median control {control:.2f}, {len(beat) / len(both):.0%} beat their control"
        figures += f" ({len(clear) / len(both):.0%} by more than their interval)"
    wins = {hand: sum(doc.get("explained_by") == hand for doc in documents) for hand in HANDS}
    figures += "; explained by " + ", ".join(f"{hand} {count}" for hand, count in wins.items() if count)
    rate = f"{new} in {seconds:.0f} s, {60 * new / max(seconds, 1e-9):.1f} features/minute"
    return f"{len(documents)} features explained: {figures}; {rate}"
