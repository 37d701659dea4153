"""Learned vectors, and images as rows of tokens."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

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
        table = self.table(rows, columns)
        if (rows, columns) == (y, x):
            return table
        patches = table[self.prefix :].reshape(rows, columns, self.width)
        patches = resize(patches, (y, x), method=self.method, antialias=self.antialias)
        return jnp.concatenate([table[: self.prefix], patches.reshape(y * x, -1)])

    def table(self, rows: int, columns: int) -> Float[Array, "T D"]:
        """The positions as they are kept."""
        init = partitioned(nn.initializers.normal(0.02), "TD")
        return self.param("embedding", init, (self.prefix + rows * columns, self.width))


class FixedPosition(GridPosition):
    """Positions that are not learned but lie with the parameters, as those of MAE.

    They start as sines and cosines, see `ops.patches.sincos_2d`, in MAE's frequencies, and
    as 0 for the tokens of the prefix. They get no gradient, and as a `bias` no decay.
    """

    def table(self, rows: int, columns: int) -> Float[Array, "T D"]:
        """The positions as they are kept."""

        def waves(*_) -> Array:
            found = sincos_2d(rows, columns, self.width, endpoint=False)
            return jnp.pad(jnp.asarray(found), ((self.prefix, 0), (0, 0)))

        return jax.lax.stop_gradient(self.param("bias", partitioned(waves, "TD")))


class SincosPosition(nn.Module):
    """Fixed sines and cosines of the row and the column, see `ops.patches.sincos_2d`."""

    width: int
    endpoint: bool = True

    def __call__(self, y: int, x: int) -> Float[Array, "T D"]:
        return jnp.asarray(sincos_2d(y, x, self.width, endpoint=self.endpoint))


class GridAngles(nn.Module):
    """Rotary angles of the row and the column of each patch, counted from 0."""

    head_dim: int
    theta: float = 1e2

    def __call__(self, y: int, x: int, *, train: bool = False) -> Float[Array, "T h"]:
        return angles_2d(*grid(y, x), self.head_dim, self.theta)


class CenteredAngles(nn.Module):
    """Rotary angles of the middles of patches, in an image that spans -1 to 1 both ways.

    A larger grid is a finer one, never one that goes on beyond what was learned: so it
    serves any resolution. The fastest pair turns once around for a distance of 1. In
    training each coordinate is moved by up to `shift`, stretched by up to `jitter` to
    itself, and both are stretched by up to `rescale`, log-uniformly, where these are given;
    one draw for a batch, from the random stream "dropout".

    Source: DINOv3, Simeoni et al. 2025, arXiv 2508.10104.
    """

    head_dim: int
    theta: float = 1e2
    shift: float | None = None
    jitter: float | None = None
    rescale: float | None = None

    @nn.compact
    def __call__(self, y: int, x: int, *, train: bool = False) -> Float[Array, "T h"]:
        size = jnp.array([y, x], jnp.float32)[:, None]
        places = (jnp.stack(grid(y, x)) + 0.5) / size * 2 - 1  # [2, T]

        def draw(reach: float, shape: tuple[int, int]) -> Float[Array, "#2 1"]:
            return jax.random.uniform(self.make_rng("dropout"), shape, None, -reach, reach)

        if train and self.shift is not None:
            places += draw(self.shift, (2, 1))
        if train and self.jitter is not None:
            places *= jnp.exp(draw(math.log(self.jitter), (2, 1)))
        if train and self.rescale is not None:
            places *= jnp.exp(draw(math.log(self.rescale), (1, 1)))
        turns = 2 * math.pi * places
        return angles_2d(turns[0], turns[1], self.head_dim, self.theta)


class MaskToken(nn.Module):
    """One learned token in the place of each masked patch, as BEiT and DINOv2 train.

    Source: Bao et al. 2022, arXiv 2106.08254.
    """

    width: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], masked: Bool[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        init = partitioned(nn.initializers.zeros, "TD")
        token = self.param("embedding", init, (1, self.width))
        if masked is None:
            return x
        return jnp.where(masked[..., None], token[None].astype(x.dtype), x)


class PatchEmbed(nn.Module):
    """Images as tokens: patches, projected, after `prefix` learned tokens and registers.

    The order is class token (and others like it: `prefix` of them), registers, patches.
    `position` is called with the grid `(y, x)` and gives what is added: `y * x` rows, and
    before them rows of the first of the tokens that stand before the patches, or of none.
    `rotary` gives angles of the patches alone; the tokens before them are not turned.
    `norm` is applied to all (CLIP). With a `mask`, `masked` patches become its token.
    """

    patch: int
    width: int
    position: nn.Module | None = None
    rotary: nn.Module | None = None
    prefix: int = 0
    registers: int = 0
    use_bias: bool = True
    norm: nn.Module | None = None
    mask: MaskToken | None = None
    channels: int | None = None  # None: any number.
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B Y X C"],
        masked: Bool[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> Tokens:
        B, Y, X, C = images.shape
        if self.channels not in (None, C):
            raise ValueError(f"images have {C} channels; the model takes {self.channels}")
        if masked is not None and self.mask is None:
            raise ValueError("masked patches need a model with a mask token; it has none")
        y, x = Y // self.patch, X // self.patch
        tokens = self.project(patchify(images, self.patch))
        if self.mask is not None:
            tokens = self.mask(tokens, masked)

        counts = {"cls": self.prefix, "registers": self.registers}
        before = [Embedding(self.width, name=n)(count) for n, count in counts.items() if count]
        before = jnp.concatenate([jnp.zeros((0, self.width)), *before])
        if self.position is not None:
            position = self.position(y, x)
            tokens += position[-y * x :].astype(self.dtype)[None]
            own = position[: -y * x]  # Of the first tokens before the patches, or of none.
            before += jnp.pad(own, ((0, len(before) - len(own)), (0, 0)))
        before = jnp.broadcast_to(before.astype(self.dtype), (B, *before.shape))
        tokens = jnp.concatenate([before, tokens], 1)
        if self.norm is not None:
            tokens = self.norm(tokens)

        block = {}
        if self.rotary is not None:
            lead = self.prefix + self.registers
            angles = self.rotary(y, x, train=train)
            block["angles"] = jnp.pad(angles, ((lead, 0), (0, 0)))[None]
        return Tokens(constrain(tokens, "BTD"), block)

    def project(self, patches: Float[Array, "B T P"]) -> Float[Array, "B T D"]:
        """Patches as vectors of the width."""
        sizes = {"D": self.width}
        linear = Einsum("BTP,PD->BTD", sizes, self.use_bias, self.dtype, name="patch")
        return linear(patches)


class TrimmedEmbed(PatchEmbed):
    """`PatchEmbed` that leaves out the last rows and columns that are short of a patch.

    So does a strided convolution: of the 384 pixels of SigLIP So400m/14 it reads 378.
    `size` is that of the images it is made for, (rows, columns).
    """

    size: tuple[int, int] | None = None

    def __call__(self, images: Float[Array, "B Y X C"], *inputs, train: bool = False) -> Tokens:
        Y, X = (n // self.patch * self.patch for n in images.shape[1:3])
        return super().__call__(images[:, :Y, :X], *inputs, train=train)
