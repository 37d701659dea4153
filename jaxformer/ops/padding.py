"""Padding: queries that see nothing and keys that nobody sees, made 0 before use.

Else a NaN there would pass through a product with a weight of 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxformer.ops import intervals as sets
from jaxformer.ops.mask import Mask


def shown(mask: Mask | None, intervals, T: int, S: int) -> tuple[Array, Array]:
    """Which queries see a key, `[#B, T]`, and which keys are seen, `[#B, S]`."""
    if mask is not None:
        return _of(mask, T, S)
    if intervals is None:
        return jnp.ones((1, T), bool), jnp.ones((1, S), bool)
    return sets.covered(intervals, S)


def blank(q, k, v, rows: Bool[Array, "#B T"], keys: Bool[Array, "#B S"]):
    """The arrays with 0 where they are padding."""
    rows, keys = rows[:, :, None, None], keys[:, :, None, None]
    return jnp.where(rows, q, 0), jnp.where(keys, k, 0), jnp.where(keys, v, 0)


def _of(mask: Mask, T: int, S: int) -> tuple[Array, Array]:
    """The same of any mask, some rows of it at a time."""
    size = min(T, 128)
    index = jnp.minimum(jnp.arange(-(-T // size) * size), T - 1).reshape(-1, size)

    def part(index):
        seen = mask.visible(index, jnp.arange(S), (T, S))
        return seen.any(2), seen.any(1)

    rows, keys = jax.lax.map(part, index)
    batch = keys.shape[1]
    return jnp.moveaxis(rows, 0, 1).reshape(batch, -1)[:, :T], keys.any(0)
