"""From a row of tokens to one vector."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.layers.embed import Embedding
from jaxformer.layers.norm import LayerNorm


class AttentionPool(nn.Module):
    """MAP: a learned probe attends to all tokens, then an MLP (Zhai et al. 2022).

    Source: arXiv 2106.04560; the probe itself is not added to what it gathers.
    """

    attention: nn.Module
    mlp: nn.Module

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        B, _, D = x.shape
        probe = Embedding(D, name="probe")(1).astype(x.dtype)
        y = self.attention(jnp.broadcast_to(probe, (B, 1, D)), x)
        y += self.mlp(LayerNorm(name="norm")(y))
        return y[:, 0]
