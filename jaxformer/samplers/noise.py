"""Normal numbers for rows that are drawn each by a key of its own."""

import jax
from jaxtyping import Array, Float, Int

from jaxformer.samplers.autoregressive import by_row


def normal(key: Array, shape: tuple[int, ...], number: Int[Array, ""] | int = 0) -> Array:
    """Rows of noise `[B, ...]`, float32, of a key for all or one a row.

    Row i is that of its key and `number` alone, such as the step's.
    """

    def row(key):
        return jax.random.normal(jax.random.fold_in(key, number), shape[1:])

    return jax.vmap(row)(by_row(key, shape[0]))


def start(key: Array, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """What a draw begins with: noise of a number that no step has."""
    return normal(key, shape, 2**31 - 1)
