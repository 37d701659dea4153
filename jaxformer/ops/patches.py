"""Images to rows of patches and back, and the positions of patches."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def patchify(images: Float[Array, "B Y X C"], patch: int) -> Float[Array, "B T P"]:
    """Cuts images into square patches, row by row: `P = patch * patch * C`.

    Raises:
      ValueError: `patch` does not divide the height or the width.
    """
    B, Y, X, C = images.shape
    if Y % patch or X % patch:
        raise ValueError(f"patch={patch} must divide the image's {Y} rows, {X} columns")
    y, x = Y // patch, X // patch
    images = images.reshape(B, y, patch, x, patch, C).swapaxes(2, 3)
    return images.reshape(B, y * x, patch * patch * C)


def unpatchify(
    patches: Float[Array, "B T P"], patch: int, shape: tuple[int, int]
) -> Float[Array, "B Y X C"]:
    """The inverse of `patchify` for images of `shape` = (rows, columns) pixels."""
    B, _, P = patches.shape
    y, x, C = shape[0] // patch, shape[1] // patch, P // patch**2
    patches = patches.reshape(B, y, x, patch, patch, C).swapaxes(2, 3)
    return patches.reshape(B, y * patch, x * patch, C)


def tubelets(
    frames: Float[Array, "B F Y X C"], tubelet: int, patch: int
) -> Float[Array, "B T P"]:
    """Cuts videos into blocks of `tubelet` frames and `patch` rows and columns.

    Time is slowest, then rows of patches: `T = f * y * x` and `P = tubelet * patch**2 * C`.
    A tubelet of one frame gives the patches of each frame, one after the other.

    Raises:
      ValueError: `tubelet` does not divide the frames, or `patch` the height or width.
    """
    B, F, *shape = frames.shape
    if F % tubelet:
        raise ValueError(f"tubelet={tubelet} must divide the video's {F} frames")
    found = patchify(frames.reshape(B * F, *shape), patch)
    _, S, P = found.shape
    found = found.reshape(B, F // tubelet, tubelet, S, P).swapaxes(2, 3)
    return found.reshape(B, F // tubelet * S, tubelet * P)


def sincos_2d(
    y: int, x: int, width: int, theta: float = 1e4, *, endpoint: bool = True
) -> np.ndarray:
    """Fixed 2-D sine and cosine positions, `[y * x, width]` float32.

    The order is [sin x, cos x, sin y, cos y], each of width / 4 frequencies that fall from
    1 to 1 / theta. With `endpoint` the last is 1 / theta itself, as in big_vision (MoCo
    v3's); without it they stop one short, as in MAE and DiT (`util/pos_embed.py`).

    Raises:
      ValueError: `width` is not a multiple of 4, or below 8 with `endpoint`.
    """
    return sincos_at(np.arange(y), np.arange(x), width, theta, endpoint=endpoint)


def sincos_at(
    y: np.ndarray, x: np.ndarray, width: int, theta: float = 1e4, *, endpoint: bool = True
) -> np.ndarray:
    """`sincos_2d` of the grid of any rows `y` and columns `x`, whole or not."""
    least = 8 if endpoint else 4
    if width % 4 or width < least:
        raise ValueError(f"sincos_2d needs a width divisible by 4 and >= {least}, got {width}")
    omega = theta ** -np.linspace(0, 1, width // 4, endpoint=endpoint)
    rows, columns = np.meshgrid(y, x, indexing="ij")
    parts = [f(p.reshape(-1, 1) * omega) for p in (columns, rows) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def sincos_1d(count: int, width: int, theta: float = 1e4) -> np.ndarray:
    """The first transformer's positions, `[count, width]` float32: sin, cos, sin, cos, ...

    Pair `i` turns by `theta ** (-2 i / width)` a place. Source: Vaswani et al. 2017.

    Raises:
      ValueError: an odd `width`.
    """
    if width % 2:
        raise ValueError(f"sincos_1d needs an even width, got {width}")
    turns = np.arange(count)[:, None] / theta ** (np.arange(0, width, 2) / width)
    pairs = np.stack([np.sin(turns), np.cos(turns)], -1)
    return pairs.reshape(count, width).astype(np.float32)


def grid(y: int, x: int) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """Row and column of each patch, in the order of `patchify`."""
    rows, columns = jnp.mgrid[:y, :x]
    return rows.reshape(-1).astype(jnp.float32), columns.reshape(-1).astype(jnp.float32)
