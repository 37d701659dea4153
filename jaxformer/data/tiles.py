"""Images of any resolution as tiles of one size, on the host.

What `models.tiled` takes, `spread` and `order`, and `models.mllama`, `fitted`. Sources:
LLaVA-NeXT, Liu et al. 2024; Llama 3.2 Vision; both by the code of transformers.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxformer.data.images import resized
from jaxformer.errors import InputError

Size = tuple[int, int]  # rows, columns.


def best(size: Size, among: Sequence[Size]) -> Size:
    """Of some resolutions, that which keeps most of an image's pixels, and wastes least.

    Example:
      >>> best((300, 800), [(336, 672), (672, 336), (672, 672)])
      (336, 672)
    """
    rows, columns = size

    def worth(other: Size) -> tuple[int, int]:
        scale = min(other[1] / columns, other[0] / rows)
        kept = min(int(columns * scale) * int(rows * scale), rows * columns)
        return kept, kept - other[0] * other[1]

    return max(among, key=worth)


def spread(
    image: np.ndarray,
    *,
    among: Sequence[Size],
    tile: int,
    method: str = "bicubic",
    longest: float | None = None,
) -> np.ndarray:
    """The tiles of an image `[Y, X, C]`, `[n, tile, tile, C]`, in the order of `order`.

    First the whole image in one tile; then the tiles of the `best` resolution, to which it is
    enlarged as it is, black at two of its sides.

    Args:
      image: uint8 or float32, as its tiles will be.
      among: resolutions, (rows, columns), multiples of `tile`.
      tile: pixels of a tile's side.
      method: see `images.resized`.
      longest: how many times a side may be the other; if not given, as in `among`.

    Raises:
      InputError: an image that is longer.
    """
    Y, X = _checked(image, among, longest)
    high, wide = best((Y, X), among)
    if wide / X < high / Y:
        size = min(math.ceil(Y * (wide / X)), high), wide
    else:
        size = high, min(math.ceil(X * (high / Y)), wide)
    spare = high - size[0], wide - size[1]
    edges = ((n // 2, n - n // 2) for n in spare)
    frame = np.pad(resized(image, size, method), (*edges, (0, 0)))
    whole = resized(image, (tile, tile), method)
    return np.concatenate([whole[None], _split(frame, tile)])


def fitted(
    image: np.ndarray,
    *,
    ratios: Sequence[Size],
    tile: int,
    method: str = "bilinear",
    longest: float | None = None,
) -> tuple[np.ndarray, int]:
    """The tiles of an image `[Y, X, C]` by the ratio that it fits best, and its number.

    `[rows * columns, tile, tile, C]`, line by line, black at the right or below, and the place
    of the ratio in the table, from 1. Of ratios that the image goes into, that into which it
    goes with the least enlargement is taken; else that for which it shrinks least.

    Args:
      image: as of `spread`.
      ratios: rows by columns of tiles, such as `layers.tiles.RATIOS`.
      tile: pixels of a tile's side.
      method: see `images.resized`.
      longest: how many times a side may be the other; if not given, as in `ratios`.

    Raises:
      InputError: an image that is longer.
    """
    Y, X = _checked(image, ratios, longest)
    frames = [(rows * tile, columns * tile) for rows, columns in ratios]
    scales = [min(high / Y, wide / X) for high, wide in frames]
    larger = [scale for scale in scales if scale >= 1]
    scale = min(larger) if larger else max(scales)
    alike = (i for i, other in enumerate(scales) if other == scale)
    number = min(alike, key=lambda i: math.prod(frames[i]))
    high, wide = frames[number]
    # No side becomes less than a tile if it need not.
    most = min(max(Y, tile), high), min(max(X, tile), wide)
    if most[1] / X < most[0] / Y:
        size = min(math.floor(Y * (most[1] / X)) or 1, most[0]), most[1]
    else:
        size = most[0], min(math.floor(X * (most[0] / Y)) or 1, most[1])
    spare = (0, high - size[0]), (0, wide - size[1])
    frame = np.pad(resized(image, size, method), (*spare, (0, 0)))
    return _split(frame, tile), number + 1


def _checked(image: np.ndarray, table: Sequence[Size], longest: float | None) -> Size:
    """An image's size, if it is not longer than the table's."""
    Y, X = image.shape[:2]
    most = longest or max(max(a, b) / min(a, b) for a, b in table)
    if min(Y, X) < 1 or max(Y, X) > most * min(Y, X):
        raise InputError(
            f"an image of {Y} x {X} pixels is longer than {most:g} to 1, the longest of its "
            "tiles; crop it, or allow more by longest="
        )
    return Y, X


def _split(frame: np.ndarray, tile: int) -> np.ndarray:
    """Tiles line by line."""
    Y, X, C = frame.shape
    parts = frame.reshape(Y // tile, tile, X // tile, tile, C).swapaxes(1, 2)
    return parts.reshape(-1, tile, tile, C)


def inside(size: Size, frame: Size) -> tuple[slice, slice]:
    """Rows and columns of a frame that an image fills, which lies in its middle.

    The image has been enlarged until it fills the frame one way; what is left on both sides
    the other way is padding.
    """
    (rows, columns), (high, wide) = size, frame
    if columns / rows > wide / high:
        own = int(round(rows * (wide / columns), 7))
        edge = (high - own) // 2
        return slice(edge, high - edge), slice(0, wide)
    own = int(round(columns * (high / rows), 7))
    edge = (wide - own) // 2
    return slice(0, high), slice(edge, wide - edge)


def order(
    sizes: Sequence[Size],
    *,
    among: Sequence[Size],
    tile: int,
    side: int,
    tiles: int,
    length: int,
) -> Int[np.ndarray, " F"]:
    """Which feature stands in each place of a row's images: the `order` of a `TiledVLM`.

    Of each image first comes its base tile, the image made small; then, line by line, what
    its tiles show of it, without their padding, and a new line after each.

    Args:
      sizes: of the row's images, in pixels.
      among: the resolutions of which each is resized to the `best`, multiples of `tile`.
      tile: pixels of a tile's side.
      side: features of a tile's side.
      tiles: that a row holds; those behind its own count for nothing.
      length: features that a row holds.

    Raises:
      InputError: more tiles or features than the row holds.
    """
    found: list[np.ndarray] = []
    count, per = 0, side * side
    newline = tiles * per
    for rows, columns in sizes:
        high, wide = best((rows, columns), among)
        y, x = high // tile, wide // tile
        found.append(count * per + np.arange(per))
        # [tile rows, tile columns, rows, columns] -> the image's own rows and columns.
        own = (count + 1) * per + np.arange(y * x * per).reshape(y, x, side, side)
        own = own.swapaxes(1, 2).reshape(y * side, x * side)
        own = own[inside((rows, columns), own.shape)]
        lines = np.pad(own, ((0, 0), (0, 1)), constant_values=newline)
        found.append(lines.reshape(-1))
        count += 1 + y * x
    every = np.concatenate([np.zeros(0, np.int64), *found])
    if count > tiles or len(every) > length:
        raise InputError(
            f"images of {list(sizes)} pixels take {count} tiles and {len(every)} features, and "
            f"a row holds {tiles} and {length}; make it longer, or take fewer images"
        )
    return np.pad(every, (0, length - len(every)), constant_values=-1).astype(np.int32)
