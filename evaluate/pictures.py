"""Pictures of what a vision model does: where it looks, and what it fills in.

A config names them: `pictures={"looks": Attention(test)}` draws some images of a pipeline at
every evaluation of a run, into its folder `pictures`. The functions beside them draw what is
at hand.
"""

import pathlib
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes

from evaluate.run import Trained
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Record
from jaxformer.errors import InputError
from jaxformer.models.flamingo import Flamingo
from jaxformer.models.vit import Encoder, attention_map
from jaxformer.objectives.reconstruct import drawn
from jaxformer.ops.patches import patchify, unpatchify


@dataclass(frozen=True)
class Attention:
    """Where a vision transformer looks in `count` images of `test`, the same at each call.

    Of layer `layer`, see `attention_picture` for `query`: 0 is the class token, which a model
    that takes the mean of its patches has not; None is the mean of all.
    """

    test: Pipeline
    count: int = 4
    layer: int = -1
    query: int | None = None

    def picture(self, trained: Trained, path: pathlib.Path) -> pathlib.Path:
        """Draws them as a PNG."""
        model: Any = trained.model

        def look(apply, params, batch):
            maps = attention_map(model, {"params": params}, batch["image"], layer=self.layer)
            return batch["image"], maps

        images, weights = trained.collect(look, _some(self.test, self.count))
        patch = model.embed.patch if isinstance(model, Encoder) else model.patch
        grid = images.shape[1] // patch, images.shape[2] // patch
        return attention_picture(images, weights, path, query=self.query, grid=grid)


@dataclass(frozen=True)
class Looks:
    """Where in `count` images the text looks as its answer begins, the same at each call.

    `prompt` are ids with the model's `image` in the places of one image, and `test` has
    `images` `[1, Y, X, C]`. Of a `models.vlm.VLM` it is what the last token gives to the
    places of the image in layer `layer` of the language model, of a `Flamingo` what it gives
    to the features in the gated layer before that one. `grid` are their rows and columns.
    """

    test: Pipeline
    prompt: tuple[int, ...]
    grid: tuple[int, int]
    count: int = 4
    layer: int = -1

    def picture(self, trained: Trained, path: pathlib.Path) -> pathlib.Path:
        """Draws them as a PNG."""
        model: Any = trained.model
        ids = np.array(self.prompt, np.int32)
        gated = isinstance(model, Flamingo)
        places = np.arange(self.grid[0] * self.grid[1]) if gated else ids == model.image

        def look(apply, params, batch):
            images = batch["images"]
            tokens = jnp.broadcast_to(ids, (len(images), len(ids)))
            how = {"method": "hidden", "mutable": ["maps"]}
            block = apply({"params": params}, tokens, images, **how)[1]["maps"]["language"]
            block = block["stack"]["block"]
            block = block["parts_0"] if gated else block
            return images[:, 0], block["attention"]["weights"][0][self.layer][:, :, -1:, places]

        images, weights = trained.collect(look, _some(self.test, self.count))
        return attention_picture(images, weights, path, query=0, grid=self.grid)


@dataclass(frozen=True)
class Reconstruction:
    """What a masked autoencoder makes of `count` images of `test`, the same at each call.

    Which patches are hidden is drawn from `seed`. Where it says pixels by the mean and the
    deviation of their patch, these are the image's own, as He et al. 2022 (MAE) draw them.
    """

    test: Pipeline
    count: int = 4
    seed: int = 0

    def picture(self, trained: Trained, path: pathlib.Path) -> pathlib.Path:
        """Draws them as a PNG."""
        objective, key = trained.objective, jax.random.key(self.seed)

        def fill(apply, params, batch):
            images = batch["image"]
            patches = patchify(images, objective.patch)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["number"])
            noise = jax.vmap(lambda key: jax.random.uniform(key, patches.shape[1:2]))(keys)
            told, mask = apply({"params": params}, images, noise)
            pixels = drawn(told, patches, normalize=objective.normalize)
            return images, mask, unpatchify(pixels, objective.patch, images.shape[1:3])

        images, mask, filled = trained.collect(fill, _some(self.test, self.count))
        y, x = (n // objective.patch for n in images.shape[1:3])
        return reconstruction_picture(images, mask.reshape(-1, y, x) > 0, filled, path)


@dataclass(frozen=True)
class _Some:
    """`count` records of a source, drawn the same each time; each knows its number here."""

    source: Any
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def __getitem__(self, index: int) -> Record:
        places = np.random.default_rng(0).permutation(len(self.source))
        return self.source[int(places[index])] | {"number": np.int32(index)}


def _some(pipeline: Pipeline, count: int) -> Pipeline:
    return Pipeline(_Some(pipeline.source, count), pipeline.transforms)


def attention_picture(
    images: Float[np.ndarray, "B Y X C"],
    weights: Float[np.ndarray, "B N T S"],
    path: str | pathlib.Path,
    *,
    query: int | None = 0,
    grid: tuple[int, int] | None = None,
) -> pathlib.Path:
    """Draws how much each patch is looked at over its image, as a PNG.

    A row an image: the image, the mean of the heads, and each head alone. What is
    looked at most is bright.

    Args:
      images: of any range; each is drawn from its least to its greatest value.
      weights: of one layer, after the softmax. The patches are the last keys, row by row;
        what comes before them (class token, registers) is left out.
      path: where to write; the suffix becomes `.png`.
      query: whose weights are drawn: 0 is the class token. None is the mean of all.
      grid: rows and columns of patches; the largest square that the keys hold, if not
        given.

    Raises:
      InputError: the grid has more patches than there are keys, or no such query.
    """
    B, N, T, S = weights.shape
    side = int(S**0.5)
    y, x = (side, side) if grid is None else grid
    if y * x > S:
        raise InputError(f"grid={y, x} has {y * x} patches, more than the {S} keys; lower it")
    if query is not None and not -T <= query < T:
        raise InputError(f"query={query} is not one of the {T} queries; lower it")
    rows = weights.mean(2) if query is None else weights[:, :, query]
    maps = np.asarray(rows, np.float32)[..., S - y * x :].reshape(B, N, y, x)
    maps = np.concatenate([maps.mean(1, keepdims=True), maps], axis=1)
    titles = ["image", "mean", *(f"head {n}" for n in range(N))]

    def draw(axis: Axes, row: int, column: int) -> None:
        Y, X, _ = images[row].shape
        box = (0.0, float(X), float(Y), 0.0)  # left, right, bottom, top.
        axis.imshow(_shown(images[row]), cmap="gray", extent=box)
        if column:
            axis.imshow(
                maps[row, column - 1],
                cmap="inferno",
                extent=box,
                alpha=0.6,
                interpolation="bilinear",
                vmin=0,
            )

    return _table(path, B, titles, draw)


def reconstruction_picture(
    images: Float[np.ndarray, "B Y X C"],
    hidden: Bool[np.ndarray, "B y x"],
    filled: Float[np.ndarray, "B Y X C"],
    path: str | pathlib.Path,
) -> pathlib.Path:
    """Draws images, what a model saw of them, and what it made of it, as a PNG.

    A row an image: the image, the image with hidden patches in grey, and that with the
    model's values in the hidden patches. He et al. 2022 (MAE) show their results so.

    Args:
      images: of any range; a row is drawn in the range of its image.
      hidden: which patches the model did not see, row by row.
      filled: the model's images; only hidden patches are drawn.
      path: where to write; the suffix becomes `.png`.

    Raises:
      InputError: the patches do not divide the images.
    """
    B, Y, X, _ = images.shape
    y, x = hidden.shape[1:]
    if Y % y or X % x:
        raise InputError(f"hidden has {y} x {x} patches, which do not divide {Y} x {X} pixels")
    mask = hidden.repeat(Y // y, axis=1).repeat(X // x, axis=2)[..., None]
    pictures = []
    for image, mask_of, made in zip(images, mask, filled, strict=True):
        span = float(image.min()), float(image.max())
        pictures.append(
            (
                _shown(image),
                np.where(mask_of, 0.5, _shown(image)),
                _shown(np.where(mask_of, made, image), span),
            )
        )

    def draw(axis: Axes, row: int, column: int) -> None:
        axis.imshow(pictures[row][column], cmap="gray", vmin=0, vmax=1)

    return _table(path, B, ["image", "seen", "filled in"], draw)


def _shown(image: np.ndarray, span: tuple[float, float] | None = None) -> np.ndarray:
    """An image in [0, 1] as matplotlib draws it, `[Y, X, 1]` or `[Y, X, 3]`."""
    low, high = (float(image.min()), float(image.max())) if span is None else span
    return np.clip((np.asarray(image, np.float32) - low) / max(high - low, 1e-6), 0, 1)


def _table(path, rows: int, titles: list[str], draw) -> pathlib.Path:
    """A picture of `rows` times `titles` axes, each drawn by `draw(axis, row, column)`."""
    columns = len(titles)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.6 * columns, 1.6 * rows + 0.3), squeeze=False
    )
    for (row, column), axis in np.ndenumerate(axes):
        draw(axis, row, column)
        axis.set_axis_off()
        if row == 0:
            axis.set_title(titles[column], fontsize=9)
    figure.tight_layout()
    path = pathlib.Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
