"""Normalisation of the last axis, always in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.sharding import partitioned


class LayerNorm(nn.Module):
    """Subtracts the mean, divides by the deviation. Source: Ba et al. 2016."""

    epsilon: float = 1e-6
    letters: str = "D"  # of the axis that is normalised.

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        shape = x.shape[-1:]
        scale = self.param("scale", partitioned(nn.initializers.ones, self.letters), shape)
        bias = self.param("bias", partitioned(nn.initializers.zeros, self.letters), shape)
        y = x.astype(jnp.float32)
        y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        lead = (None,) * (x.ndim - 1)
        return (y * scale[lead] + bias[lead]).astype(x.dtype)


class RMSNorm(nn.Module):
    """Divides by the root of the mean square. Source: Zhang and Sennrich 2019."""

    epsilon: float = 1e-6
    letters: str = "D"

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param(
            "scale", partitioned(nn.initializers.ones, self.letters), x.shape[-1:]
        )
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * scale[(None,) * (x.ndim - 1)]).astype(x.dtype)
