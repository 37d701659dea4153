"""What an evaluation shows a person."""

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from jaxformer import metrics


def table(step: int, found: dict[str, metrics.Metrics]) -> str:
    """A line a metric: its value and the examples it was counted over."""
    lines = [f"step {step}"]
    for name, group in found.items():
        for metric, m in group.items():
            value = m.value()
            if isinstance(value, float):
                count = int(np.sum(m.count))
                text = f"{value:.4f}  of {count}"
                if np.issubdtype(m.sum.dtype, np.integer):
                    text = f"{value:.4f}  {int(m.sum)} of {count}"
                lines.append(f"  {name}/{metric:<12} {text}")
            elif isinstance(value, dict):
                text = ", ".join(f"{k}={v}" for k, v in value.items())
                lines.append(f"  {name}/{metric}: {text}")
    return "\n".join(lines)


def confusion_picture(confusion: metrics.Confusion, path: pathlib.Path) -> pathlib.Path:
    """Draws how often each class (row) was called each class (column) as a PNG."""
    counts = np.asarray(confusion.sum)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(6, 5.2))
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(counts) <= 20:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if share[row, column] > 0.5 else "black"
                axis.text(column, row, count, ha="center", va="center", color=color)
        axis.set_xticks(range(len(counts)))
        axis.set_yticks(range(len(counts)))
    axis.set_xlabel("called")
    axis.set_ylabel("is")
    right = int(np.trace(counts))
    axis.set_title(f"{right} of {int(confusion.count)} right")
    figure.colorbar(image, label="share of the row")
    figure.tight_layout()
    path = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
