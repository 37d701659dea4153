"""Images and videos as large as they are into rows of patches, on the host.

What `models.native` takes. Source: Qwen2-VL, Wang et al. 2024, arXiv 2409.12191.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxformer.errors import InputError

LONGEST = 200  # times the other side.


def fit(
    rows: int,
    columns: int,
    *,
    factor: int = 28,
    least: int = 56 * 56,
    most: int = 14 * 14 * 4 * 1280,
) -> tuple[int, int]:
    """The size to which an image is resized: near its own, whole merged tokens both ways.

    Args:
      rows: of the image, in pixels.
      columns: of the image.
      factor: pixels of a merged token's side.
      least: the fewest pixels of the result.
      most: the most.

    Raises:
      InputError: a side more than 200 times the other.

    Example:
      >>> fit(480, 641)
      (476, 644)
    """
    if min(rows, columns) < 1 or max(rows, columns) > LONGEST * min(rows, columns):
        raise InputError(
            f"an image of {rows} x {columns} pixels is more than {LONGEST} times as long as "
            "wide; cut it"
        )
    sizes = [round(n / factor) * factor for n in (rows, columns)]
    if math.prod(sizes) > most:
        shrink = math.sqrt(rows * columns / most)
        sizes = [max(factor, int(n / shrink / factor) * factor) for n in (rows, columns)]
    elif math.prod(sizes) < least:
        grow = math.sqrt(least / (rows * columns))
        sizes = [math.ceil(n * grow / factor) * factor for n in (rows, columns)]
    return sizes[0], sizes[1]


def cut(
    frames: np.ndarray, *, patch: int, side: int = 2, depth: int = 2, name: str = "image"
) -> tuple[Float[np.ndarray, "T P"], tuple[int, int, int]]:
    """An image `[Y, X, C]` or a video `[F, Y, X, C]` as patches, and its grid.

    A patch is `depth` frames deep; of an image they are the same, and so is the last frame
    of a video again where `depth` does not divide its frames. Patches come frame by frame,
    in blocks of `side` by `side`, each block row by row.

    Raises:
      InputError: what is no image, or has pixels that blocks do not divide.
    """
    frames = frames[None] if frames.ndim == 3 else frames
    if frames.ndim != 4 or 0 in frames.shape:
        raise InputError(
            f"{name} has shape {frames.shape}; an image is [rows, columns, channels], and a "
            "video has frames before them"
        )
    F, Y, X, C = frames.shape
    block = patch * side
    if Y % block or X % block:
        raise InputError(
            f"{name} has {Y} x {X} pixels, which {side} patches of {patch} do not divide; "
            "resize it as data.native.fit says"
        )
    if F % depth:
        frames = np.concatenate([frames, *[frames[-1:]] * (-F % depth)])
    f, y, x = len(frames) // depth, Y // block, X // block
    # [f, depth, y, side, patch, x, side, patch, C] -> [f, y, x, side, side, depth, ...]
    parts = frames.reshape(f, depth, y, side, patch, x, side, patch, C)
    parts = parts.transpose(0, 2, 5, 3, 6, 1, 4, 7, 8)
    patches = parts.reshape(f * y * x * side**2, depth * patch**2 * C)
    return patches, (f, y * side, x * side)


def rows(
    samples: Sequence[Sequence[np.ndarray]],
    *,
    patch: int,
    length: int,
    count: int,
    side: int = 2,
    depth: int = 2,
    channels: int = 3,
) -> dict[str, np.ndarray]:
    """A row of patches for each sample, which holds its images and videos in order.

    Args:
      samples: the images and videos of each, as `cut` takes them; it may have none.
      patch: side of a patch in pixels.
      length: patches that a row holds.
      count: images that a row holds at most.
      side: patches of a merged token's side.
      depth: frames of a patch.
      channels: of all images.

    Returns:
      `patches` `[rows, length, depth * patch * patch * channels]` float32, with 0 for
      padding; `grids` `[rows, count, 3]` int32, frames, rows and columns of patches, zeros
      for none.

    Raises:
      InputError: an image as in `cut`, more of them than `count`, or more patches than
        `length`.

    Example:
      >>> made = rows([[np.zeros((4, 8, 3))], []], patch=2, length=12, count=2)
      >>> made["patches"].shape, made["grids"].tolist()
      ((2, 12, 24), [[[1, 2, 4], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]])
    """
    patches = np.zeros((len(samples), length, depth * patch**2 * channels), np.float32)
    grids = np.zeros((len(samples), count, 3), np.int32)
    for row, images in enumerate(samples):
        if len(images) > count:
            raise InputError(f"sample {row} has {len(images)} images; a row holds {count}")
        start = 0
        for i, image in enumerate(images):
            name = f"sample {row}, image {i}"
            own, grid = cut(image, patch=patch, side=side, depth=depth, name=name)
            stop = start + len(own)
            if own.shape[1] != patches.shape[2]:
                raise InputError(
                    f"{name} has {image.shape[-1]} channels; the rows are of {channels}"
                )
            if stop > length:
                raise InputError(
                    f"{name} ends at patch {stop} and a row holds {length}; make it smaller "
                    "(data.native.fit, most=), or the row longer"
                )
            patches[row, start:stop], grids[row, i], start = own, grid, stop
    return {"patches": patches, "grids": grids}
