"""The picture at the end of a run, drawn from its metrics.jsonl."""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

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


def _evaluations(rows, name) -> list[str]:
    ends = {"loss": "/loss", "accuracy": "/top1"}.get(name)
    names = {key for row in rows for key in row if key.startswith("eval/")}
    return sorted(key for key in names if ends is not None and key.endswith(ends))


def _line(axis, rows, name, label, **style) -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    axis.plot(*zip(*points, strict=True), label=label, **style)
