"""A picture of what a model draws: a column a class, a row a draw."""

import pathlib
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float

from evaluate.draw import Draw
from evaluate.run import Trained


@dataclass(frozen=True)
class Grid:
    """`rows` draws of each of the first `columns` classes, or of no class.

    With `given`, rows of labels, a draw of each of them.
    """

    draw: Draw
    rows: int = 8
    columns: int = 10
    given: tuple[tuple[int, ...], ...] | None = None

    def check(self) -> None:
        """Raises InputError where the draw's autoencoder is not there."""
        self.draw.check()

    def picture(self, trained: Trained, path: pathlib.Path) -> pathlib.Path:
        """Draws them as a PNG."""
        classes = self.draw.classes(trained)
        if self.given is not None:
            labels = [label for row in self.given for label in row]
            images = self.draw.images(trained, labels)
            return grid_picture(images.reshape(len(self.given), -1, *images.shape[1:]), path)
        columns = self.columns if classes is None else min(self.columns, classes.count)
        labels = None if classes is None else list(range(columns)) * self.rows
        images = self.draw.images(trained, labels, columns * self.rows)
        shape = images.shape[1:]
        titles = None if classes is None else [str(i) for i in range(columns)]
        return grid_picture(images.reshape(self.rows, columns, *shape), path, titles)


def grid_picture(
    images: Float[np.ndarray, "R K Y X C"],
    path: str | pathlib.Path,
    titles: list[str] | None = None,
) -> pathlib.Path:
    """Draws images in [0, 1] in rows and columns as a PNG, with a title a column."""
    R, K, Y, X, C = images.shape
    framed = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
    table = framed.transpose(0, 2, 1, 3, 4).reshape(R * (Y + 2), K * (X + 2), C)
    figure = plt.figure(figsize=(0.6 * K, 0.6 * R + 0.3))
    axis = figure.add_axes((0, 0, 1, 0.6 * R / (0.6 * R + 0.3)))
    axis.imshow(table if C == 3 else table[..., 0], cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()
    for i, title in enumerate(titles or []):
        axis.text((i + 0.5) * (X + 2) - 0.5, -1.5, title, ha="center", fontsize=11)
    path = pathlib.Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
