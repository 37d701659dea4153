"""Draws from a categorical law whose tail is drawn as often as it should be.

`jax.random.categorical` adds to each logit a Gumbel number made of a float32 uniform of 23
bits, which never passes 16: an entry 17 below the rest is hardly ever drawn, however many
of them there are. Here small uniforms have all their digits, down to 2 ** -65.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def uniform(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Numbers between 0 and 1, neither of them, float32 of full precision near 0.

    `uniform(key, ()) < p` is true with probability `p` to within rounding, for `p` of 1e-15
    as for one half.
    """
    high, low = jax.random.bits(key, (2, *shape), jnp.uint32).astype(jnp.float32)
    found = high * 2.0**-32 + (low + 0.5) * 2.0**-64
    return jnp.minimum(found, 1 - 2.0**-24)


def draw(key: Array, logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """An index of each row, with the probabilities `softmax(logits)`; -inf is never drawn.

    First a block of about `sqrt(V)` entries by its sum, then one of its entries, each by
    Gumbel's trick (Maddison et al. 2014, arXiv 1411.0030): `2 sqrt(V)` random numbers and not
    `V`. A row of nothing but -inf gives an index without meaning.

    Example:
      >>> int(draw(jax.random.key(0), jnp.array([-jnp.inf, 0.0])))
      1
    """
    *batch, V = logits.shape
    size = math.isqrt(V - 1) + 1
    count = -(-V // size)
    logits = logits.astype(jnp.float32)
    ends = [(0, 0)] * len(batch) + [(0, count * size - V)]
    blocks = jnp.pad(logits, ends, constant_values=-jnp.inf).reshape(*batch, count, size)
    which, within = jax.random.split(key)
    block = _largest(which, jax.nn.logsumexp(blocks, -1))
    inside = jnp.take_along_axis(blocks, block[..., None, None], -2)[..., 0, :]
    return block * size + _largest(within, inside)


def _largest(key: Array, logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    waits = -jnp.log1p(-uniform(key, logits.shape))  # Exponential; small ones are exact.
    return jnp.argmax(logits - jnp.log(waits), -1).astype(jnp.int32)
