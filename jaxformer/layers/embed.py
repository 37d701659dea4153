"""Learned vectors, and patches of images as tokens."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.einsum import Einsum
from jaxformer.ops.patches import patchify
from jaxformer.sharding import partitioned


class Embedding(nn.Module):
    """A learned table `[count, width]`: positions, class and register tokens, probes."""

    width: int
    letters: str = "TD"
    std: float = 0.02

    @nn.compact
    def __call__(self, count: int) -> Float[Array, "T D"]:
        init = partitioned(nn.initializers.normal(self.std), self.letters)
        return self.param("embedding", init, (count, self.width))


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each: a strided convolution without one."""

    patch: int
    width: int
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, images: Float[Array, "B Y X C"]) -> Float[Array, "B T D"]:
        x = patchify(images, self.patch)
        sizes = {"D": self.width}
        return Einsum("BTP,PD->BTD", sizes, True, self.dtype, name="patch")(x)
