"""Rotary positions: angles from coordinates, and the rotation itself.

Pairs are the two halves of a head, `(x[i], x[i + H/2])`, as Llama, Qwen and DINOv3 have
them. Source: Su et al. 2021, arXiv 2104.09864.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def angles(
    positions: Int[Array, "*B T"] | Float[Array, "*B T"],
    head_dim: int,
    theta: float = 1e4,
) -> Float[Array, "*B T h"]:
    """Angles in radians of 1-D positions, one for each of the `head_dim / 2` pairs."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    positions = jnp.asarray(positions, jnp.float32)
    return positions[..., None] * frequency[(None,) * positions.ndim]


def angles_2d(
    y: Float[Array, "*B T"] | Int[Array, "*B T"],
    x: Float[Array, "*B T"] | Int[Array, "*B T"],
    head_dim: int,
    theta: float = 1e2,
) -> Float[Array, "*B T h"]:
    """Angles of 2-D positions: half of the pairs turn with the row, half with the column.

    Source: axial rotary of Heo et al. 2024, arXiv 2403.13298.
    """
    if head_dim % 4:
        raise ValueError(f"2-D rotary needs head_dim divisible by 4, got {head_dim}")
    parts = [angles(p, head_dim // 2, theta) for p in (y, x)]
    return jnp.concatenate(parts, axis=-1)


def angles_of_axes(
    places: tuple[Float[Array, "*B T"] | Int[Array, "*B T"], ...],
    sizes: tuple[int, ...],
    theta: float = 1e4,
) -> Float[Array, "*B T h"]:
    """Angles of positions on several axes: of a head's numbers, `sizes[i]` turn with axis i."""
    parts = [angles(p, size, theta) for p, size in zip(places, sizes, strict=True)]
    return jnp.concatenate(parts, axis=-1)


def axes_of_sections(sections: tuple[int, ...], *, interleaved: bool = False) -> np.ndarray:
    """By which axis each pair of a head turns, where `sections[i]` pairs turn by axis i.

    Chunked, sections follow each other (Qwen2-VL, arXiv 2409.12191). `interleaved`, pairs
    take turns: each third by rows and each third by columns until those sections are used
    up, and all others by frames (Qwen3-VL, 2511.21631), so that every axis has fast pairs.

    Example:
      >>> axes_of_sections((1, 2, 2)).tolist()
      [0, 1, 1, 2, 2]
      >>> axes_of_sections((3, 2, 2), interleaved=True).tolist()
      [0, 1, 2, 0, 1, 2, 0]
    """
    count = len(sections)
    if not interleaved:
        return np.repeat(np.arange(count), sections)
    found = np.zeros(sum(sections), int)
    for axis in range(1, count):
        found[axis : count * sections[axis] : count] = axis
    return found


def centered_places(y: int, x: int, text: int) -> tuple[Int[Array, "3 T"], Int[Array, "3 S"]]:
    """Frame, row and column of the patches of one image, and of the tokens of its text.

    Rows and columns are counted from the middle, so that an image of another size goes on
    both ways; the text is on the diagonal, from where the image ends on the longer side.
    Source: Qwen-Image (arXiv 2508.02324), MSRoPE.
    """
    rows, columns = jnp.mgrid[:y, :x].reshape(2, -1)
    image = jnp.stack([0 * rows, rows - (y - y // 2), columns - (x - x // 2)])
    return image, jnp.broadcast_to(max(y // 2, x // 2) + jnp.arange(text), (3, text))


def rotate(
    x: Float[Array, "B T N H"], angles: Float[Array, "#B T h"]
) -> Float[Array, "B T N H"]:
    """Rotates pair `i` of every head at token `t` by `angles[..., t, i]`, in float32."""
    return turn(x, jnp.cos(angles), jnp.sin(angles))


def turn(
    x: Float[Array, "B T N H"], cos: Float[Array, "#B T h"], sin: Float[Array, "#B T h"]
) -> Float[Array, "B T N H"]:
    """`rotate` by angles of which the cosines and sines are at hand."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
