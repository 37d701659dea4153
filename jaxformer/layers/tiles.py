"""Images cut into tiles of one size: their embedding, and who sees whose tokens.

An image has as many tiles as its aspect ratio has, of up to `n`; the others are padding. A
ratio is told by its number in a table of them, from 1; 0 is no image.

Source: Llama 3.2 Vision, by the code of transformers (`mllama`).
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import Embedding
from jaxformer.layers.norm import LayerNorm
from jaxformer.ops.mask import Mask
from jaxformer.ops.patches import patchify
from jaxformer.sharding import partitioned

# All rows by columns of up to four tiles, in the order of their numbers.
RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


def counts(ratios: tuple[tuple[int, int], ...], number: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """How many tiles images have, by the numbers of their ratios; 1 where there is none.

    >>> counts(RATIOS, jnp.array([0, 1, 6])).tolist()
    [1, 1, 4]
    """
    table = np.array([1, *(rows * columns for rows, columns in ratios)], np.int32)
    return jnp.asarray(table)[number]


class Served(Mask):
    """A token sees the images from `first` to `last`; one of `last` 0 sees everything.

    Images are counted from 1; `number` is that of each key, 0 for padding. What such a
    token, which is `blind`, sees, is for who uses the mask to leave out.
    """

    first: Int[Array, "B T"]
    last: Int[Array, "B T"]
    number: Int[Array, "B S"]

    @property
    def blind(self) -> Bool[Array, "B T"]:
        """Which tokens see no image."""
        return self.last == 0

    def visible(self, q, k, lengths):
        first, last = self.first[:, q, None], self.last[:, q, None]
        number = self.number[:, None, k]
        return (last == 0) | ((number >= first) & (number <= last) & (number > 0))


class PaddingApart(Mask):
    """All see all, but padding does not see padding: `real` is what is none."""

    real: Bool[Array, "B T"]

    def visible(self, q, k, lengths):
        return self.real[:, q, None] | self.real[:, None, k]


class TileVectors(nn.Module):
    """A vector of each tile by the ratio of its image, behind a gate that begins shut."""

    ratios: int
    tiles: int
    width: int

    @nn.compact
    def __call__(self, number: Int[Array, " B"]) -> Float[Array, "B n D"]:
        init = partitioned(nn.initializers.normal(0.02), "VTD")
        shape = (self.ratios + 1, self.tiles, self.width)
        table = self.param("embedding", init, shape)
        scale = self.param("scale", partitioned(nn.initializers.zeros, ""), ())
        return jnp.tanh(scale) * table[number]


class TilePositions(nn.Module):
    """Positions within a tile, and by a gate more and more those within the whole image.

    With the gate shut, as it begins, a patch has the position that it has in its tile;
    wide open, that which it has in an image of this ratio.
    """

    ratios: int
    tiles: int
    patches: int  # of a tile, the class token among them.
    width: int

    @nn.compact
    def __call__(self, number: Int[Array, " B"]) -> Float[Array, "B n T D"]:
        own = Embedding(self.width, name="tile")(self.patches)
        whole = partitioned(nn.initializers.normal(0.02), "VLTD")
        shape = (self.ratios + 1, self.tiles, self.patches, self.width)
        table = self.param("embedding", whole, shape)
        scale = self.param("scale", partitioned(nn.initializers.zeros, ""), ())
        gate = jnp.tanh(scale)
        return (1 - gate) * own[None, None] + gate * table[number]


class TileEmbed(nn.Module):
    """Tiles as tokens: patches and the tile's vector, a class token first, then positions.

    Tiles are `size` pixels high and wide; there are `tiles` of an image, padding and all.
    """

    patch: int
    width: int
    size: int
    tiles: int
    ratios: tuple[tuple[int, int], ...] = RATIOS
    channels: int = 3
    dtype: DTypeLike = jnp.bfloat16

    def setup(self):
        count, D = len(self.ratios), self.width
        sizes = {"D": D}
        self.project = Einsum("BTP,PD->BTD", sizes, dtype=self.dtype, name="patch")
        self.tile = TileVectors(count, self.tiles, D)
        self.cls = Embedding(D)
        patches = (self.size // self.patch) ** 2 + 1
        self.position = TilePositions(count, self.tiles, patches, D)
        self.norm = LayerNorm(1e-5)

    def __call__(
        self, images: Float[Array, "B n Y X C"], number: Int[Array, " B"]
    ) -> Float[Array, "B n T D"]:
        B, n, *tile = images.shape
        if n != self.tiles or tuple(tile) != (self.size, self.size, self.channels):
            raise ValueError(
                f"images of {n} tiles of {tuple(tile)} are given; the model takes {self.tiles} "
                f"of {(self.size, self.size, self.channels)}: pad them with tiles of 0"
            )
        x = self.project(patchify(images.reshape(B * n, *tile), self.patch))
        x = x.reshape(B, n, -1, self.width) + self.tile(number)[:, :, None].astype(self.dtype)
        cls = jnp.broadcast_to(self.cls(1).astype(self.dtype), (B, n, 1, self.width))
        x = jnp.concatenate([cls, x], 2)
        return self.norm(x + self.position(number).astype(self.dtype)).astype(self.dtype)
