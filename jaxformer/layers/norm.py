"""Normalisation of the last axis, always in float32."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.ops.norm import Norm
from jaxformer.sharding import partitioned


class LayerNorm(nn.Module):
    """Subtracts the mean, divides by the deviation. Source: Ba et al. 2016."""

    epsilon: float = 1e-6
    letters: str = "D"  # of the axis that is normalised.

    @nn.compact
    def weights(self, size: int) -> Norm:
        """The norm of an axis of `size` as data, for who applies it elsewhere."""
        ones, zeros = (
            partitioned(init, self.letters)
            for init in (nn.initializers.ones, nn.initializers.zeros)
        )
        scale, bias = self.param("scale", ones, (size,)), self.param("bias", zeros, (size,))
        return Norm(scale, bias, self.epsilon, centered=True)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.weights(x.shape[-1])(x)


class BareLayerNorm(nn.Module):
    """LayerNorm without weights, as DiT has it: who comes after it has them."""

    epsilon: float = 1e-6
    letters: str = "D"

    def weights(self, size: int) -> Norm:
        """The norm of an axis of `size` as data, for who applies it elsewhere."""
        return Norm(jnp.ones(size), None, self.epsilon, centered=True)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.weights(x.shape[-1])(x)


class RMSNorm(nn.Module):
    """Divides by the root of the mean square. Source: Zhang and Sennrich 2019."""

    epsilon: float = 1e-6
    letters: str = "D"

    @nn.compact
    def weights(self, size: int) -> Norm:
        """The norm of an axis of `size` as data, for who applies it elsewhere."""
        ones = partitioned(nn.initializers.ones, self.letters)
        return Norm(self.param("scale", ones, (size,)), None, self.epsilon)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.weights(x.shape[-1])(x)


class OneRMSNorm(RMSNorm):
    """RMSNorm whose weight is what its scale has more than 1. Source: Gemma's code."""

    @nn.compact
    def weights(self, size: int) -> Norm:
        """The norm of an axis of `size` as data, for who applies it elsewhere."""
        zeros = partitioned(nn.initializers.zeros, self.letters)
        return Norm(1 + self.param("scale", zeros, (size,)), None, self.epsilon)
