"""Pictures of a run, drawn from its metrics.jsonl."""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from train.goodput import KINDS

PANELS = ("loss", "accuracy", "grad_norm", "learning_rate")


def draw(source: pathlib.Path, target: pathlib.Path) -> bool:
    """Draws loss, accuracy, gradient norm and rate by step; False if there is no row."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    panels = [name for name in PANELS if any(row.get(name) is not None for row in rows)]
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    for name, axis in zip(panels, axes[0], strict=True):
        _line(axis, rows, name, "train")
        for other in _evaluations(rows, name):
            _line(axis, rows, other, other.split("/")[1], marker="o")
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if name == "loss":
            axis.set_yscale("log")
        if len(axis.lines) > 1:
            axis.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return True


def shares(source: pathlib.Path, target: pathlib.Path, bins: int = 60) -> None:
    """Draws what the time of a run went into: a bar for each part of its wall time.

    A row of the log stands for the time since the row before, spread evenly over it.
    """
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows = [row for row in rows if row.get("seconds/all")]
    whole = np.array([row["seconds/all"] for row in rows])
    ends = np.cumsum(whole)
    edges = np.linspace(0.0, ends[-1], bins + 1)
    spent = {
        kind: np.array([row.get(f"seconds/{kind}", 0.0) for row in rows]) for kind in KINDS
    }
    spent = {"steps": whole - sum(spent.values())} | spent
    unit, name = next(
        u
        for u in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
        if ends[-1] > 2 * u[0] or u[0] == 1
    )
    figure, axis = plt.subplots(figsize=(8.4, 3.4))
    below = np.zeros(bins)
    for kind, seconds in spent.items():
        so_far = np.interp(edges, [0.0, *ends], [0.0, *np.cumsum(seconds)])
        share = np.diff(so_far) / np.diff(edges)
        if share.max() > 0:
            label = f"{kind} {sum(seconds) / ends[-1]:.1%}"
            axis.bar(
                edges[:-1] / unit, share, edges[1] / unit, below, align="edge", label=label
            )
        below += share
    axis.set(xlabel=name, ylabel="share of the time", ylim=(0, 1), xlim=(0, ends[-1] / unit))
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _evaluations(rows, name) -> list[str]:
    ends = {"loss": "/loss", "accuracy": "/top1"}.get(name)
    names = {key for row in rows for key in row if key.startswith("eval/")}
    return sorted(key for key in names if ends is not None and key.endswith(ends))


def _line(axis, rows, name, label, **style) -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    axis.plot(*zip(*points, strict=True), label=label, **style)
