"""The arithmetic of a tile, the same on every chip."""

import math

import jax.numpy as jnp
from jax import Array, lax

LOG2E = math.log2(math.e)  # Chips have the exponential of 2: logits are multiplied by this.


def multiply(a: Array, b: Array, *, contract: int) -> Array:
    """`a [M, C]` times `b`, `[C, N]` or with `contract=1` `[N, C]`, summed in float32.

    Operands of 32 bits are multiplied as such, and not cut to TF32 or bfloat16.
    """
    exact = a.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((1,), (contract,)), ((), ())), precision, preferred_element_type=jnp.float32
    )
