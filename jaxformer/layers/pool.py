"""From a row of tokens to one vector."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import Embedding
from jaxformer.layers.norm import LayerNorm


class First(nn.Module):
    """The first token, the class token."""

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        return x[:, 0]


class Average(nn.Module):
    """The mean of all tokens after the first `skip`."""

    skip: int = 0

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        return x[:, self.skip :].mean(1)


class FirstAndAverage(nn.Module):
    """The first token, beside the mean of all after the first `skip`: `2 D` numbers.

    What DINOv2's linear classifiers look at (Oquab et al. 2023, arXiv 2304.07193).
    """

    skip: int = 1

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B E"]:
        return jnp.concatenate([x[:, 0], x[:, self.skip :].mean(1)], -1)


class Rest(nn.Module):
    """Another pooling of the tokens after the first `skip`."""

    pool: nn.Module
    skip: int = 0

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        return self.pool(x[:, self.skip :])


class AttentionPool(nn.Module):
    """MAP: a learned probe attends to all tokens, then an MLP (Zhai et al. 2022).

    Source: arXiv 2106.04560; the probe itself is not added to what it gathers.
    """

    attention: nn.Module
    mlp: nn.Module
    epsilon: float = 1e-6  # of the norm before the MLP.

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        B, _, D = x.shape
        probe = Embedding(D, name="probe")(1).astype(x.dtype)
        y = self.attention(jnp.broadcast_to(probe, (B, 1, D)), x)
        y += self.mlp(LayerNorm(self.epsilon, name="norm")(y))
        return y[:, 0]


class TanhLayer(nn.Module):
    """A linear layer and tanh, as ViT (pre-training) and BERT treat their pooled vector."""

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B P"]:
        sizes = {"P": self.width}
        return jnp.tanh(Einsum("BD,DP->BP", sizes, True, self.dtype, name="linear")(x))
