"""Activations by their exact definitions; the names say which of two one gets."""

import functools

import jax
from jaxtyping import Array, Float

gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
silu = jax.nn.silu
relu = jax.nn.relu


def gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Exact GELU, `x / 2 * (1 + erf(x / sqrt 2))`. Source: Hendrycks and Gimpel 2016.

    Written with erf, as torch does; `jax.nn.gelu` takes erfc, which costs twice as much
    on a CPU.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def quick_gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`x * sigmoid(1.702 x)`, the GELU of the first CLIP. Source: Hendrycks and Gimpel 2016."""
    return x * jax.nn.sigmoid(1.702 * x)


def mish(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`x * tanh(softplus(x))`. Source: Misra 2019, arXiv 1908.08681."""
    return x * jax.numpy.tanh(jax.nn.softplus(x))
