"""Images of any resolution as tiles of one size, on the host: what `models.tiled` takes.

Source: LLaVA-NeXT, Liu et al. 2024.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

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
