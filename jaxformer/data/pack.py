"""Images of any shape into rows of patches, on the host: what `layers.pack` takes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxformer.errors import InputError


def pack(
    images: Sequence[np.ndarray],
    *,
    patch: int,
    length: int,
    count: int,
    rows: int | None = None,
) -> dict[str, np.ndarray]:
    """Cuts images into patches and lays several in a row, each in the first with room.

    All arrays have the same shape whatever the images are, once `rows` is given.

    Args:
      images: `[Y, X, C]` each, of one dtype and any size that `patch` divides.
      patch: side of a patch in pixels.
      length: patches that a row holds.
      count: images that a row holds at most.
      rows: how many rows there are; as many as it takes if not given.

    Returns:
      `patches` `[rows, length, patch * patch * C]` in the images' dtype, with 0 for
      padding; `grids` `[rows, count, 2]` int32, rows and columns of patches of each image,
      (0, 0) for none; `index` `[rows, count]` int32, which of `images` it is, -1 for none.

    Raises:
      InputError: an image that is none, that the patch does not divide, or that is too
        large for a row; images that do not go into `rows`.

    Example:
      >>> made = pack([np.zeros((4, 8, 3)), np.ones((4, 4, 3))], patch=4, length=4, count=2)
      >>> made["patches"].shape, made["grids"].tolist()
      ((1, 4, 48), [[[1, 2], [1, 1]]])
    """
    if not images:
        raise InputError("there are no images to pack; give one or more")
    cut = [patches_of(image, patch, f"image {i}") for i, image in enumerate(images)]
    size = images[0].shape[-1] * patch * patch
    held: list[list[int]] = []
    room: list[int] = []
    for i, (patches, grid) in enumerate(cut):
        if len(patches) > length:
            raise InputError(
                f"image {i} has {grid[0]} x {grid[1]} = {len(patches)} patches of {patch} "
                f"pixels and a row holds {length}; make it smaller, or the row longer"
            )
        if patches.shape[1] != size:
            raise InputError(
                f"image {i} has {images[i].shape[-1]} channels and image 0 has "
                f"{images[0].shape[-1]}; all must have as many"
            )
        fits = (r for r in range(len(held)) if room[r] >= len(patches) and len(held[r]) < count)
        row = next(fits, len(held))
        if row == len(held):
            held.append([])
            room.append(length)
        held[row].append(i)
        room[row] -= len(patches)
    if rows is not None and len(held) > rows:
        left = sum(map(len, held[rows:]))
        raise InputError(
            f"{len(images)} images take {len(held)} rows of {length} patches, and there are "
            f"{rows}: {left} are left over; pack fewer at a time, or longer rows"
        )
    return _lay(cut, held, len(held) if rows is None else rows, length, count)


def patches_of(
    image: np.ndarray, patch: int, name: str
) -> tuple[Float[np.ndarray, "T P"], tuple[int, int]]:
    """Patches of an image, in the order of `ops.patches.patchify`, and its grid."""
    if image.ndim != 3 or 0 in image.shape:
        raise InputError(
            f"{name} has shape {image.shape}; an image is [rows, columns, channels]"
        )
    Y, X, C = image.shape
    if Y % patch or X % patch:
        raise InputError(
            f"{name} has {Y} x {X} pixels, which patch={patch} does not divide; resize it to "
            f"{-(-Y // patch) * patch} x {-(-X // patch) * patch}"
        )
    y, x = Y // patch, X // patch
    patches = image.reshape(y, patch, x, patch, C).swapaxes(1, 2)
    return patches.reshape(y * x, patch * patch * C), (y, x)


def _lay(cut, held: list[list[int]], rows: int, length: int, count: int):
    """The arrays, from patches and which images each row holds."""
    first = cut[0][0]
    patches = np.zeros((rows, length, first.shape[1]), first.dtype)
    grids: Int[np.ndarray, "B n 2"] = np.zeros((rows, count, 2), np.int32)
    index = np.full((rows, count), -1, np.int32)
    for row, some in enumerate(held):
        start = 0
        for place, i in enumerate(some):
            own, grid = cut[i]
            patches[row, start : start + len(own)] = own
            grids[row, place], index[row, place] = grid, i
            start += len(own)
    return {"patches": patches, "grids": grids, "index": index}
