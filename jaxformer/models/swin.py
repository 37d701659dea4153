"""Swin: attention inside windows that shift from block to block, and a shrinking grid.

Source: Liu et al. 2021, arXiv 2103.14030.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Remat, Stack
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import PatchEmbed, Tokens
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import Average
from jaxformer.models.vit import Encoder, Numbers
from jaxformer.ops.mask import Mask
from jaxformer.ops.patches import patchify, unpatchify
from jaxformer.sharding import constrain, partitioned

Grid = tuple[int, int]  # Rows and columns of tokens.
EPSILON = 1e-5  # of every norm.


@dataclasses.dataclass(frozen=True)
class Size:
    """What a named size fixes."""

    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


SIZES = {
    "T": Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "S": Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "B": Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "L": Size(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


def named(name: str, **fields) -> "Swin":
    """A Swin by its usual name: `named("T", num_classes=1000)`; other fields as given."""
    if name not in SIZES:
        raise ValueError(f"{name!r} is no Swin; write one of {', '.join(SIZES)}")
    return Swin(**{**vars(SIZES[name]), **fields})


class Regions(Mask):
    """Tokens see those of their own region, which may stand anywhere in the row.

    No kernel can be told that by ranges of keys: XLA computes it.
    """

    ids: Int[Array, "B T"]

    def visible(self, q, k, lengths) -> Bool[Array, "B t s"]:
        return self.ids[:, q, None] == self.ids[:, None, k]


class WindowAttention(Attention):
    """Attention inside the square windows of a grid, with a bias for each distance.

    The grid is filled up with 0 to whole windows, and these are keys like all others. With
    a `shift` it is rolled by so much, up and to the left, and what did not lie side by side
    before sees nothing of each other. A grid that is no larger than a window is not shifted.
    """

    window: int = 7
    shift: int = 0

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "B T D"], *, grid: Grid
    ) -> Float[Array, "B T D"]:
        (B, T, D), w = x.shape, self.window
        shift = self.shift if min(grid) > w else 0
        whole = (-(-grid[0] // w) * w, -(-grid[1] // w) * w)
        maps = x.reshape(B, *grid, D)
        fill = [(0, after - before) for before, after in zip(grid, whole, strict=True)]
        maps = jnp.roll(jnp.pad(maps, ((0, 0), *fill, (0, 0))), (-shift, -shift), (1, 2))
        windows = patchify(maps, w)
        n = windows.shape[1]
        mask = None
        if shift:
            ids = jnp.tile(jnp.asarray(self.regions(whole)), (B, 1))
            mask = Regions(ids)
        bias = self.bias()
        y = super().__call__(windows.reshape(B * n, w * w, D), mask=mask, bias=bias)
        maps = unpatchify(y.reshape(B, n, w * w * D), w, whole)
        maps = jnp.roll(maps, (shift, shift), (1, 2))[:, : grid[0], : grid[1]]
        return constrain(maps.reshape(B, T, D), "BTD")

    def regions(self, whole: Grid) -> Int[np.ndarray, "n S"]:
        """The region of each token of each window, in a shifted grid of whole windows."""
        rows, columns = (
            (np.arange(n) >= n - self.window).astype(np.int32)
            + (np.arange(n) >= n - self.shift)
            for n in whole
        )
        ids = rows[:, None] * 3 + columns
        w = self.window
        ids = ids.reshape(whole[0] // w, w, whole[1] // w, w).swapaxes(1, 2)
        return ids.reshape(-1, w * w)

    def bias(self) -> Float[Array, "1 N S S"]:
        """What is added to the logits of a window, by the distance of query from key."""
        w, N = self.window, self.num_heads
        init = partitioned(nn.initializers.truncated_normal(0.02), "TN")
        table = self.param("bias", init, ((2 * w - 1) ** 2, N))
        return jnp.transpose(table[self.distances()], (2, 0, 1))[None]

    def distances(self) -> Int[np.ndarray, "S S"]:
        """The row of the table of biases for each query and key of a window."""
        w = self.window
        places = np.indices((w, w)).reshape(2, -1)
        rows, columns = places[:, :, None] - places[:, None, :] + w - 1
        return rows * (2 * w - 1) + columns


class Pair(nn.Module):
    """Two blocks in a row, of which the second has shifted windows."""

    first: Block
    second: Block

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        train: bool = False,
        drop_path_rate: Float[Array, "2"] | None = None,
        **inputs,
    ) -> Float[Array, "B T D"]:
        for i, block in enumerate((self.first, self.second)):
            rate = None if drop_path_rate is None else drop_path_rate[i]
            x = block(x, train=train, drop_path_rate=rate, **inputs)
        return x


class Merge(nn.Module):
    """Every two rows and columns of tokens become one token of twice the width.

    The four are laid side by side, column by column, normalised and projected. A grid of an
    odd side is filled up with 0.
    """

    epsilon: float = EPSILON
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], grid: Grid
    ) -> tuple[Float[Array, "B t E"], Grid]:
        B, _, D = x.shape
        fill = [(0, n % 2) for n in grid]
        maps = jnp.pad(x.reshape(B, *grid, D), ((0, 0), *fill, (0, 0)))
        grid = (maps.shape[1] // 2, maps.shape[2] // 2)
        four = maps.reshape(B, grid[0], 2, grid[1], 2, D).transpose(0, 1, 3, *self.order, 5)
        four = four.reshape(B, grid[0] * grid[1], 4 * D)
        four = LayerNorm(self.epsilon, letters="F", name="norm")(four)
        sizes = {"D": 2 * D}
        return Einsum("BTF,FD->BTD", sizes, False, self.dtype, name="reduce")(four), grid

    @property
    def order(self) -> tuple[int, int]:
        """The axes of a pair of columns and of a pair of rows, the slower first."""
        return (4, 2)


class Stages(nn.Module):
    """Stacks of pairs of blocks, each at half of the grid of the one before."""

    stages: tuple[Stack, ...]
    merge: Callable[..., nn.Module] = Merge
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, grid: Grid, train: bool = False
    ) -> Float[Array, "B t E"]:
        for i, stage in enumerate(self.stages):
            if i:
                x, grid = self.merge(dtype=self.dtype, name=f"merge_{i - 1}")(x, grid)
            x = stage(x, train=train, grid=grid)
        return x


class GridEmbed(nn.Module):
    """The tokens of `embed`, with their grid told to the blocks.

    Images are filled up with 0 to whole patches. `size` is that of the images it is made
    for, (rows, columns); it takes others too.
    """

    embed: PatchEmbed
    size: tuple[int, int] | None = None

    def setup(self):
        nn.share_scope(self, self.embed)

    def __call__(self, images: Float[Array, "B Y X C"], *, train: bool = False) -> Tokens:
        p = self.embed.patch
        fill = [(0, -n % p) for n in images.shape[1:3]]
        images = jnp.pad(images, ((0, 0), *fill, (0, 0)))
        grid = (images.shape[1] // p, images.shape[2] // p)
        tokens = self.embed(images, train=train)
        return tokens._replace(block={**tokens.block, "grid": grid})


def stage(
    attention: WindowAttention, mlp: Mlp, depth: int, *, epsilon: float = EPSILON, **stack
) -> Stack:
    """A stage of `depth` blocks of such parts; `stack` are fields of `Stack`.

    Raises:
      ValueError: an odd depth.
    """
    if depth % 2:
        raise ValueError(f"a stage has pairs of blocks; its depth={depth} must be even")
    first, second = (
        # Clones, as one module in two places would be one set of parameters.
        Block(attention.clone(shift=shift), mlp.clone(), epsilon=epsilon, parent=None)
        for shift in (0, attention.window // 2)
    )
    return Stack(Pair(first, second, parent=None), depth // 2, parent=None, **stack)


def drop_paths(depths: tuple[int, ...], rate: float) -> list[tuple[tuple[float, ...], ...]]:
    """The rate of each pair of blocks of each stage: from 0 to `rate` over all blocks."""
    rates = np.split(np.linspace(0, rate, sum(depths)), np.cumsum(depths)[:-1])
    return [tuple(zip(x[::2].tolist(), x[1::2].tolist(), strict=False)) for x in rates]


class Swin(Numbers):
    """Swin by its numbers; `parts()` is the same as an `Encoder`.

    `model.apply({"params": params}, images)` gives logits `[B, V]`; with `num_classes=0`
    it gives the mean of the last tokens `[B, E]`, `E = width * 2 ** (stages - 1)`. Images
    may have any size: grids are filled up to whole patches, windows and pairs. With `size`
    and `channels`, those it is made for, the parts can be saved as transformers' Swin.
    """

    width: int  # of the first stage; each has twice the width of the one before.
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    patch: int = 4
    window: int = 7
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    size: tuple[int, int] | None = None
    channels: int | None = None  # None: any number.
    drop_path: float = 0.0  # of the last block; the first's is 0.
    remat: Remat = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def parts(self) -> Encoder:
        """The parts that these numbers stand for.

        Raises:
          ValueError: as many heads as depths there are not; heads that do not divide their
            stage's width; an odd depth.
        """
        if len(self.depths) != len(self.num_heads):
            raise ValueError(f"depths={self.depths} and num_heads={self.num_heads} differ")
        stages, same = [], {"use_bias": True, "dtype": self.dtype, "parent": None}
        rates = drop_paths(self.depths, self.drop_path)
        for i, (depth, N) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            D = self.width * 2**i
            if D % N:
                raise ValueError(f"num_heads={N} of stage {i} must divide its width {D}")
            stages.append(
                stage(
                    WindowAttention(N, D // N, window=self.window, **same),
                    Mlp(int(self.mlp_ratio * D), **same),
                    depth,
                    remat=self.remat,
                    unroll=self.unroll,
                    drop_path=rates[i],
                )
            )
        embed = PatchEmbed(
            self.patch,
            self.width,
            norm=LayerNorm(EPSILON, parent=None),
            channels=self.channels,
            dtype=self.dtype,
            parent=None,
        )
        return Encoder(
            GridEmbed(embed, self.size, parent=None),
            Stages(tuple(stages), dtype=self.dtype, parent=None),
            LayerNorm(EPSILON, parent=None),
            Average(parent=None),
            num_classes=self.num_classes,
            dtype=self.dtype,
            parent=None,
        )


def flops(model: Swin, shape: tuple[int, int, int] = (224, 224, 3)) -> int:
    """Floating-point operations of one image forward, as `models.vit.flops` counts them."""
    Y, X, C = shape
    p, w = model.patch, model.window
    y, x, D = -(-Y // p), -(-X // p), model.width
    total = y * x * p**2 * C * D
    for i, depth in enumerate(model.depths):
        if i:
            y, x, D = (y + 1) // 2, (x + 1) // 2, 2 * D
            total += y * x * 2 * D * D
        T = y * x
        padded = -(-y // w) * w * (-(-x // w) * w)
        block = 4 * padded * D * D + 2 * padded * w * w * D
        total += depth * (block + 2 * T * D * int(model.mlp_ratio * D))
    return 2 * (total + D * model.num_classes)
