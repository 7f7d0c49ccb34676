"""Pictures of a run: how often features fire, and how training went."""

import sys

import torch

from sae.artifacts import atomic_write


def draw(picture, path, *what):
    """One of the pictures below; whatever ails it is a line on standard error, and the run goes on."""
    try:
        picture(path, *what)
    except Exception as err:
        print(f"\nno picture {path}: {type(err).__name__}: {err}", file=sys.stderr)


def frequency_histogram(path, log10_frequency, title, band=None):
    """PNG: how many features have which log10 frequency [F]; dead ones are counted in the legend.

    `band` = (lower, upper) is shaded: the features that samples are taken of.
    """
    figure, axes = _figure()
    alive = log10_frequency[torch.isfinite(log10_frequency)]
    dead = len(log10_frequency) - len(alive)
    axes.hist(alive.numpy(), bins=80, color="#3b6ea5", label=f"{len(alive)} alive, {dead} dead")
    if band is not None:
        axes.axvspan(*band, color="#e8a33d", alpha=0.25, label=f"band {band[0]:g} to {band[1]:g}")
    axes.set(title=title, xlabel="log10 of the share of tokens a feature fires on", ylabel="features")
    axes.legend(frameon=False)
    _save(path, figure)


def loss_curves(path, metrics, title):
    """PNG from the lines of metrics.jsonl: loss over training tokens, and the held-out figures."""
    import numpy as np

    figure, axes = _figure(rows=4, height=10)

    def curves(row, event, **labels):
        lines = [line for line in metrics if line["event"] == event]
        tokens = np.array([line["tokens"] for line in lines])
        for name, label in labels.items():
            values = np.array([line[name] for line in lines], dtype=float)  # None is a gap
            row.plot(tokens, values, "-" if event == "log" else "o-", label=label)

    curves(axes[0], "log", loss="loss", mse="squared error", l1="l1 x sum of activations")
    curves(axes[1], "log", l0="L0, training")
    curves(axes[1], "checkpoint", l0="L0, held out")
    shares = {name: name.replace("_", " ") for name in ("explained_variance", "loss_recovered", "dead_share")}
    curves(axes[2], "checkpoint", **shares)
    curves(axes[3], "checkpoint", ce="as it is", ce_sae="with the autoencoder", ce_zero="with zeros")
    axes[0].set(title=title, ylabel="per token")
    axes[1].set(ylabel="features per token")
    axes[2].set(ylabel="share, held out", ylim=(-0.05, 1.05))
    axes[3].set(ylabel="cross-entropy, held out", xlabel="training tokens")
    for row in axes:
        # A log axis with nothing on it draws no line either.
        if row in axes[:2] and any((line.get_ydata() > 0).any() for line in row.lines):
            row.set_yscale("log")
        for event in (line for line in metrics if line["event"] == "resample"):
            row.axvline(event["tokens"], color="#999999", linewidth=0.8, linestyle=":")
        row.legend(frameon=False)
    _save(path, figure)


def pareto(path, lines):
    """PNG from the newest lines of sweep.jsonl: what each autoencoder of a sweep keeps, over its L0."""
    figure, axes = _figure(rows=3, height=9)
    for row, name in zip(axes, ("explained_variance", "loss_recovered", "dead_share"), strict=True):
        known = [line for line in lines if line[name] is not None and line["l0"] > 0]
        row.scatter([line["l0"] for line in known], [line[name] for line in known])
        for line in known:
            row.annotate(line["folder"], (line["l0"], line[name]), fontsize=7)
        row.set(ylabel=f"{name.replace('_', ' ')}, held out", xscale="log" if known else "linear")
    axes[-1].set_xlabel("L0, features per token")
    _save(path, figure)


def _figure(rows=1, height=4):
    # Not pyplot: its global state would keep every figure of a long run alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True)


def _save(path, figure):
    with atomic_write(path) as handle:
        figure.savefig(handle, format="png", dpi=90)
