"""Images at their own aspect ratio in a pipeline: patches, and several images in a row.

`FitPatches` makes patches of each image, as many as go into a length, and `JoinRows` lays
a few images in each row, for models of `layers.pack`:

    Pipeline(source, (Decode(), Normalize(0.5, 0.5), FitPatches(16, 256)), (JoinRows(4),))
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxformer.data.images import pixels_of, resized
from jaxformer.data.pack import patches_of
from jaxformer.data.sources import Record
from jaxformer.errors import InputError


def best_grid(shape: tuple[int, int], length: int) -> tuple[int, int]:
    """The grid of patches, (rows, columns), that shows most of an image of `shape`.

    It is that of the largest scale at which the image, each side rounded up to whole
    patches, has `length` patches or fewer. Source: SigLIP 2 NaFlex, arXiv 2502.14786; its
    code searches for what is computed here.

    >>> best_grid((480, 640), 256)
    (14, 18)
    """
    Y, X = shape
    if length < 1 or min(shape) < 1:
        raise InputError(f"an image of {Y} x {X} pixels has no grid of length={length} patches")
    # The number of patches grows only where a side becomes a whole number of them.
    grids = [(y, -(-X * y // Y)) for y in range(1, length + 1)]
    grids += [(-(-Y * x // X), x) for x in range(1, length + 1)]
    fits = [(y, x) for y, x in grids if y * x <= length]
    return max(fits, key=lambda grid: grid[0] * grid[1])


@dataclass(frozen=True)
class FitPatches:
    """The record's `image` becomes `patches` `[length, P]` and `grids` `[1, 2]`.

    The image is resized, bilinear and antialiased, to the `best_grid` of patches of `patch`
    pixels; `P` is `patch * patch * C`, rows after the last patch are 0.
    """

    patch: int
    length: int

    def __call__(self, record: Record) -> Record:
        image = pixels_of(record)
        y, x = best_grid(image.shape[:2], self.length)
        image = resized(image, (y * self.patch, x * self.patch))
        own, grid = patches_of(image, self.patch, record.get("source", "image"))
        patches = np.zeros((self.length, own.shape[1]), own.dtype)
        patches[: len(own)] = own
        rest = {name: value for name, value in record.items() if name != "image"}
        return rest | {"patches": patches, "grids": np.array([grid], np.int32)}


@dataclass(frozen=True)
class JoinRows:
    """A batch transform: each `count` images share a row, one after the other.

    `patches` `[B, l, P]` become `[B / count, length, P]` and `grids` `[B / count, count,
    2]`; all else, such as labels, stays `[B]`, in the order of the model's outputs. `length`
    is `count * l` if not given; images are small on the whole if less will do.

    Raises:
      InputError: `count` does not divide the batch, or a row has more than `length` patches.
    """

    count: int
    length: int | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        patches, grids = batch["patches"], batch["grids"]
        B, L, P = patches.shape
        if B % self.count:
            raise InputError(
                f"JoinRows: count={self.count} must divide the batch of {B} images"
            )
        length = self.length or self.count * L
        rows = np.zeros((B // self.count, length, P), patches.dtype)
        sizes = grids[:, 0].prod(1)
        for i, row in enumerate(rows):
            some = range(i * self.count, (i + 1) * self.count)
            joined = np.concatenate([patches[j, : sizes[j]] for j in some])
            if len(joined) > length:
                raise InputError(
                    f"JoinRows: {self.count} images have {len(joined)} patches and a row "
                    f"length={length}; make it longer, or FitPatches' length less"
                )
            row[: len(joined)] = joined
        return batch | {"patches": rows, "grids": grids.reshape(-1, self.count, 2)}
