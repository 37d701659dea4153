"""Learned vectors, and images as rows of tokens."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.einsum import Einsum
from jaxformer.ops.patches import grid, patchify, sincos_2d
from jaxformer.ops.resize import resize
from jaxformer.ops.rotary import angles_2d
from jaxformer.sharding import constrain, partitioned


class Tokens(NamedTuple):
    """What an embedding hands on: tokens, and what else each block and the pooling take."""

    x: Float[Array, "B T D"]
    block: Mapping[str, Any] = MappingProxyType({})  # such as mask=, angles=.
    pool: Mapping[str, Any] = MappingProxyType({})


class Embedding(nn.Module):
    """A learned table `[count, width]`: positions, class and register tokens, probes."""

    width: int
    letters: str = "TD"
    std: float = 0.02

    @nn.compact
    def __call__(self, count: int) -> Float[Array, "T D"]:
        init = partitioned(nn.initializers.normal(self.std), self.letters)
        return self.param("embedding", init, (count, self.width))


class GridPosition(nn.Module):
    """Learned positions of a grid of patches, resized where an image has another grid.

    `shape` is the grid, (rows, columns), that the table is of; without it, the grid that
    comes is the table's own. The first `prefix` rows of the table are those of the tokens
    before the patches, and keep their values. Resizing is torch's, in float32.
    """

    width: int
    shape: tuple[int, int] | None = None
    prefix: int = 0
    method: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = False

    @nn.compact
    def __call__(self, y: int, x: int) -> Float[Array, "T D"]:
        rows, columns = self.shape or (y, x)
        init = partitioned(nn.initializers.normal(0.02), "TD")
        count = self.prefix + rows * columns
        table = self.param("embedding", init, (count, self.width))
        if (rows, columns) == (y, x):
            return table
        patches = table[self.prefix :].reshape(rows, columns, self.width)
        patches = resize(patches, (y, x), method=self.method, antialias=self.antialias)
        return jnp.concatenate([table[: self.prefix], patches.reshape(y * x, -1)])


class SincosPosition(nn.Module):
    """Fixed sines and cosines of the row and the column, see `ops.patches.sincos_2d`."""

    width: int

    def __call__(self, y: int, x: int) -> Float[Array, "T D"]:
        return jnp.asarray(sincos_2d(y, x, self.width))


class GridAngles(nn.Module):
    """Rotary angles of the row and the column of each patch, counted from 0."""

    head_dim: int
    theta: float = 1e2

    def __call__(self, y: int, x: int) -> Float[Array, "T h"]:
        return angles_2d(*grid(y, x), self.head_dim, self.theta)


class PatchEmbed(nn.Module):
    """Images as tokens: patches, projected, after `prefix` learned tokens and registers.

    The order is class token (and other tokens that have positions: `prefix` of them),
    registers, patches. `position` is called with the grid `(y, x)` and gives what is added:
    `y * x` rows, or those of the prefix before them. `rotary` gives angles of the patches
    alone; the tokens before them are not turned. `norm` is applied to all (CLIP).
    """

    patch: int
    width: int
    position: nn.Module | None = None
    rotary: nn.Module | None = None
    prefix: int = 0
    registers: int = 0
    use_bias: bool = True
    norm: nn.Module | None = None
    channels: int | None = None  # None: any number.
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, images: Float[Array, "B Y X C"], *, train: bool = False) -> Tokens:
        B, Y, X, C = images.shape
        if self.channels not in (None, C):
            raise ValueError(f"images have {C} channels; the model takes {self.channels}")
        y, x = Y // self.patch, X // self.patch
        sizes = {"D": self.width}
        patches = patchify(images, self.patch)
        tokens = Einsum("BTP,PD->BTD", sizes, self.use_bias, self.dtype, name="patch")(patches)

        position = jnp.zeros((0, self.width))
        if self.position is not None:
            position = self.position(y, x)
            tokens += position[-y * x :].astype(self.dtype)[None]
        before = []
        if self.prefix:
            cls = Embedding(self.width, name="cls")(self.prefix)
            own = position[: -y * x]  # Rows of the prefix, or none.
            before.append(cls + own if len(own) else cls)
        if self.registers:
            before.append(Embedding(self.width, name="registers")(self.registers))
        for rows in reversed(before):
            rows = jnp.broadcast_to(rows.astype(self.dtype), (B, *rows.shape))
            tokens = jnp.concatenate([rows, tokens], 1)
        if self.norm is not None:
            tokens = self.norm(tokens)

        block = {}
        if self.rotary is not None:
            lead = self.prefix + self.registers
            block["angles"] = jnp.pad(self.rotary(y, x), ((lead, 0), (0, 0)))[None]
        return Tokens(constrain(tokens, "BTD"), block)
