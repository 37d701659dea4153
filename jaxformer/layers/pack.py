"""Rows of several images: the parts of an encoder that packs them, see `ops.pack`.

Their parameters are named and shaped as those of the parts for one image a row, so that
what one has learned the other takes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import Embedding, Tokens
from jaxformer.layers.norm import LayerNorm
from jaxformer.ops.mask import Segments
from jaxformer.ops.pack import Places, places, resize
from jaxformer.ops.rotary import angles_2d
from jaxformer.sharding import constrain, partitioned


class PackedPosition(nn.Module):
    """Learned positions of a grid of `shape`, resized to the grid of each image.

    `GridPosition(width, shape, method="bilinear", antialias=True)` of one image a row.
    """

    width: int
    shape: tuple[int, int]

    @nn.compact
    def __call__(self, at: Places) -> Float[Array, "B T D"]:
        rows, columns = self.shape
        init = nn.initializers.normal(0.02)
        table = self.param("embedding", partitioned(init, "TD"), (rows * columns, self.width))
        return resize(table.reshape(rows, columns, -1), at)


class PackedAngles(nn.Module):
    """Rotary angles of the row and the column of each patch in its image: `GridAngles`."""

    head_dim: int
    theta: float = 1e2

    def __call__(self, at: Places) -> Float[Array, "B T h"]:
        return angles_2d(at.y, at.x, self.head_dim, self.theta)


class PackedEmbed(nn.Module):
    """Patches of several images as tokens, each of which sees its own image: `PatchEmbed`.

    Called with patches `[B, T, P]`, each `patch * patch * channels` numbers in the order of
    `ops.patches.patchify`, and the images' grids `[B, n, 2]`, as `data.pack.pack` makes
    them. What padding holds does not matter. Pooling then gives `n` vectors a row, and an
    Encoder `B * n`: image i of row b is number `b * n + i`, and 0 where there is none.

    Raises:
      ValueError: patches of another size.
    """

    patch: int
    width: int
    position: nn.Module | None = None
    rotary: nn.Module | None = None
    channels: int = 3
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "B T P"],
        grids: Int[Array, "B n 2"],
        *,
        train: bool = False,
    ) -> Tokens:
        _, T, P = patches.shape
        if self.patch**2 * self.channels != P:
            raise ValueError(
                f"patches have {P} numbers; the model takes {self.patch} * {self.patch} * "
                f"{self.channels} channels"
            )
        at = places(grids, T)
        # A NaN in padding would reach the gradient of every kernel by a product with 0.
        patches = jnp.where((at.ids > 0)[..., None], patches, 0)
        sizes = {"D": self.width}
        x = Einsum("BTP,PD->BTD", sizes, True, self.dtype, name="patch")(patches)
        if self.position is not None:
            x += self.position(at).astype(self.dtype)
        block = {} if self.rotary is None else {"angles": self.rotary(at)}
        block["mask"] = Segments(at.ids)
        pool = {"ids": at.ids, "count": grids.shape[1]}
        return Tokens(constrain(x, "BTD"), block, pool)


class PackedAverage(nn.Module):
    """The mean of the tokens of each image: `Average`."""

    def __call__(
        self, x: Float[Array, "B T D"], ids: Int[Array, "B T"], count: int
    ) -> Float[Array, "C D"]:
        own = (ids[:, None] == 1 + jnp.arange(count)[None, :, None]).astype(jnp.float32)
        own /= jnp.maximum(own.sum(-1, keepdims=True), 1)
        y = jnp.einsum("BnT,BTD->BnD", own, x, precision=jax.lax.Precision.HIGHEST)
        return y.reshape(-1, x.shape[-1]).astype(x.dtype)


class PackedAttentionPool(nn.Module):
    """MAP with a probe for each image, which attends to that image: `AttentionPool`."""

    attention: nn.Module
    mlp: nn.Module
    epsilon: float = 1e-6  # of the norm before the MLP.

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], ids: Int[Array, "B T"], count: int
    ) -> Float[Array, "C D"]:
        B, _, D = x.shape
        probe = Embedding(D, name="probe")(1).astype(x.dtype)
        probe = jnp.broadcast_to(probe, (B, count, D))
        images = jnp.broadcast_to(1 + jnp.arange(count)[None], (B, count))
        y = self.attention(probe, x, mask=Segments(images, ids))
        y += self.mlp(LayerNorm(self.epsilon, name="norm")(y))
        there = (ids[:, None] == images[..., None]).any(-1)
        return jnp.where(there[..., None], y, 0).reshape(-1, D)
