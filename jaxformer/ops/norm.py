"""The maths of normalisation: a norm with its weights is a small function of arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


class Norm(struct.PyTreeNode):
    """Normalises the last axis in float32 and gives back the dtype it was given.

    `centered` subtracts the mean and makes it LayerNorm (Ba et al. 2016); without, it is
    RMSNorm (Zhang and Sennrich 2019). `scale` and `bias` are the learned weights.
    """

    scale: Float[Array, " D"]
    bias: Float[Array, " D"] | None = None
    epsilon: float = struct.field(pytree_node=False, default=1e-6)
    centered: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        if self.centered:
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        lead = (None,) * (x.ndim - 1)
        y *= self.scale[lead]
        return (y if self.bias is None else y + self.bias[lead]).astype(x.dtype)
