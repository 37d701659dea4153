"""Several images of any shape in one row of patches: where each patch lies.

A row holds the patches of its images one after the other, each row by row or block by block,
then padding.
All that says so is the grid of each image, as data: other images compile nothing anew.
Sources: NaViT, Dehghani et al. 2023 (arXiv 2307.06304); NaFlex, of SigLIP 2, Tschannen
et al. 2025 (2502.14786), is a row with one image.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int


class Places(NamedTuple):
    """Of each patch of each row: its image, its place there, and the image's grid.

    Padding has image 0 and the grid (1, 1).
    """

    ids: Int[Array, "B T"]  # from 1 on, the images of a row in order.
    y: Int[Array, "B T"]
    x: Int[Array, "B T"]
    rows: Int[Array, "B T"]
    columns: Int[Array, "B T"]


def places(grids: Int[Array, "B n 2"], length: int) -> Places:
    """Where each of `length` patches of each row lies.

    Args:
      grids: rows and columns of patches of each image; (0, 0) is none.
      length: of a row.

    Raises:
      ValueError: images with more patches than a row holds, where `grids` are not traced.

    Example:
      >>> places(jnp.array([[[1, 2], [2, 1]]]), 5).ids.tolist()
      [[1, 1, 2, 2, 0]]
    """
    if not isinstance(grids, Tracer):
        most = np.asarray(grids).prod(-1).sum(-1).max(initial=0)
        if most > length:
            raise ValueError(f"a row of {length} patches cannot hold images of {most}")
    count = grids.shape[1]
    sizes = grids.prod(-1)
    stops = jnp.cumsum(sizes, 1)
    index = jnp.arange(length)[None]
    image = (index[..., None] >= stops[:, None]).sum(-1)
    real, image = image < count, jnp.minimum(image, count - 1)
    grid = jnp.take_along_axis(grids, image[..., None], 1)
    rows, columns = (jnp.where(real, grid[..., i], 1) for i in (0, 1))
    index = index - jnp.take_along_axis(stops - sizes, image, 1)
    y, x = (jnp.where(real, i, 0) for i in (index // columns, index % columns))
    return Places(jnp.where(real, image + 1, 0), y, x, rows, columns)


def blocks(grids: Int[Array, "B n 3"], length: int, side: int) -> Places:
    """Where patches lie that come in blocks of `side` by `side`, each block row by row.

    So do those of images and videos that an encoder merges: what becomes one token stands
    side by side. Each frame of a video is an image of its own in `ids`.

    Args:
      grids: frames, rows and columns of patches; (0, 0, 0) is none.
      length: of a row.
      side: of a block, which divides rows and columns.

    Raises:
      ValueError: grids that `side` does not divide, or more patches than a row holds, where
        `grids` are not traced.

    Example:
      >>> at = blocks(jnp.array([[[2, 2, 4]]]), 16, 2)
      >>> at.ids[0].tolist(), at.x[0, :8].tolist()
      ([1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2], [0, 1, 0, 1, 2, 3, 2, 3])
    """
    if not isinstance(grids, Tracer):
        known = np.asarray(grids)
        if (known[..., 1:] % side).any():
            raise ValueError(
                f"side={side} must divide the rows and columns of every grid; resize images "
                "as data.native.fit says"
            )
        most = known.prod(-1).sum(-1).max(initial=0)
        if most > length:
            raise ValueError(f"a row of {length} patches cannot hold images of {most}")
    count = grids.shape[1]
    sizes, frames = (
        grids.prod(-1),
        jnp.where(grids[..., 1] * grids[..., 2] > 0, grids[..., 0], 0),
    )
    stops, before = jnp.cumsum(sizes, 1), jnp.cumsum(frames, 1) - frames
    index = jnp.arange(length)[None]
    image = (index[..., None] >= stops[:, None]).sum(-1)
    real, image = image < count, jnp.minimum(image, count - 1)
    grid = jnp.take_along_axis(grids, image[..., None], 1)
    rows, columns = (jnp.where(real, grid[..., i], side) for i in (1, 2))
    index = index - jnp.take_along_axis(stops - sizes, image, 1)
    frame, index = index // (rows * columns), index % (rows * columns)
    block, inside = index // side**2, index % side**2
    across = columns // side
    y = block // across * side + inside // side
    x = block % across * side + inside % side
    ids = 1 + jnp.take_along_axis(before, image, 1) + frame
    ids, y, x = (jnp.where(real, i, 0) for i in (ids, y, x))
    return Places(ids, y, x, jnp.where(real, rows, 1), jnp.where(real, columns, 1))


def windows(at: Places, side: int) -> Int[Array, "B T"]:
    """The window of `side` by `side` patches in which each lies, as an id of its own.

    Ids grow from image to image and, in one, row by row; windows at its right and lower
    edge are what is left. Padding has 0.
    """
    across = -(-at.columns // side)
    number = at.y // side * across + at.x // side
    return jnp.where(at.ids > 0, at.ids * at.ids.shape[1] + number, 0)


def weights(
    place: Int[Array, "B T"], new: Int[Array, "B T"], old: int
) -> Float[Array, "B T S"]:
    """The weight of each of `old` samples at `place` of `new`: the sizes are data here.

    Those of `ops.resize.weights(old, new, method="bilinear", antialias=True)`, row `place`.
    """
    scale = (old / new.astype(jnp.float32))[..., None]
    middle = scale * (place[..., None] + 0.5)
    samples = jnp.arange(old, dtype=jnp.float32)[None, None] + 0.5
    out = jnp.maximum(1 - jnp.abs((samples - middle) / jnp.maximum(scale, 1)), 0)
    return out / out.sum(-1, keepdims=True)


def corner_weights(
    place: Int[Array, "B T"], new: Int[Array, "B T"], old: int
) -> Float[Array, "B T S"]:
    """`weights` by which the first and the last of `new` are the first and last of `old`.

    Bilinear, without antialias: torch's, with its corners aligned.
    """
    middle = place * (old - 1) / jnp.maximum(new - 1, 1)
    samples = jnp.arange(old, dtype=jnp.float32)[None, None]
    return jnp.maximum(1 - jnp.abs(samples - middle[..., None].astype(jnp.float32)), 0)


def resize(
    table: Float[Array, "Y X D"], at: Places, law: Callable[..., Array] = weights
) -> Float[Array, "B T D"]:
    """A table of a grid, resized to each image's own and read at each patch.

    Bilinear with antialias, as `ops.resize.resize`, or by another `law`: `corner_weights`;
    float32. At padding it is no one's.
    """
    Y, X, D = table.shape
    y, x = law(at.y, at.rows, Y), law(at.x, at.columns, X)
    both = (y[..., :, None] * x[..., None, :]).reshape(*y.shape[:2], Y * X)
    flat = table.astype(jnp.float32).reshape(Y * X, D)
    return jnp.matmul(both, flat, precision=jax.lax.Precision.HIGHEST)
