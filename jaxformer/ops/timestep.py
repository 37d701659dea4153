"""Times as vectors: cosines and sines of many wave lengths, in the two layouts of the field.

Both take times in the units of their originals: DiT's count steps from 0 to 1000, and so
must a time between 0 and 1 be multiplied first. SiT leaves that out, and most of its
features hardly vary.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Times = Float[Array, "*B"] | Int[Array, "*B"]


def cosines_first(t: Times, size: int, period: float = 1e4) -> Float[Array, "*B C"]:
    """`[cos, sin]` of `t * period ** (-i / n)`, i from 0 to n - 1, n = size / 2: DiT's.

    Source: facebookresearch/DiT, `TimestepEmbedder`; GLIDE and diffusers' Flux have it so.
    """
    turns = _turns(t, size, size // 2, period)
    return jnp.concatenate([jnp.cos(turns), jnp.sin(turns)], -1)


def cosines_to_period(t: Times, size: int, period: float = 1e4) -> Float[Array, "*B C"]:
    """`cosines_first` with frequencies that fall to 1 / `period` itself: i / (n - 1).

    Source: diffusers, `DiTTransformer2DModel`, which so departs from the original DiT.
    """
    turns = _turns(t, size, size // 2 - 1, period)
    return jnp.concatenate([jnp.cos(turns), jnp.sin(turns)], -1)


def sines_first(t: Times, size: int, period: float = 1e4) -> Float[Array, "*B C"]:
    """`[sin, cos]` of `t * period ** (-i / (n - 1))`, whose last wave length is the period's.

    Source: google-deepmind/md4 and the first DDPM (arXiv 2006.11239).
    """
    turns = _turns(t, size, size // 2 - 1, period)
    return jnp.concatenate([jnp.sin(turns), jnp.cos(turns)], -1)


def steps(t: Times, count: float) -> Float[Array, "*B"]:
    """`count * t`, and a whole number exactly where `t` is one of `count`.

    In float32 `511 / 1000 * 1000` is not 511, and a cosine of it is off by 3e-5.
    """
    product = jnp.asarray(t, jnp.float32) * count
    off = jnp.round(product) - product
    near = jnp.abs(off) < 2e-7 * jnp.abs(product)
    return product + jax.lax.stop_gradient(jnp.where(near, off, 0.0))


def _turns(t: Times, size: int, count: int, period: float) -> Float[Array, "*B h"]:
    if size % 2 or count < 1:
        raise ValueError(f"size={size} must be even, and 4 or more: half of it are sines")
    # On the host, and in torch's order: at a thousand steps a rounding of these shows.
    exponent = np.float32(-math.log(period)) * np.arange(size // 2, dtype=np.float32)
    frequency = np.exp(exponent / np.float32(count))
    return jnp.asarray(t, jnp.float32)[..., None] * frequency[(None,) * t.ndim]
