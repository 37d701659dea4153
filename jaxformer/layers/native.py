"""Parts of encoders that take images and videos as large as they are, and merge patches.

A row holds the patches of its images and frames one after the other, those that become one
token side by side: `ops.pack.blocks`. Source: Qwen2-VL (arXiv 2409.12191), 2.5 (2502.13923).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.layers.block import Block
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import Tokens
from jaxformer.ops.mask import Mask, Segments
from jaxformer.ops.pack import Places, blocks, corner_weights, resize, windows
from jaxformer.ops.rotary import angles_2d
from jaxformer.sharding import constrain, partitioned


class NativeEmbed(nn.Module):
    """Patches `[B, T, P]` of images and videos as tokens, each of which sees its own frame.

    A patch is `frames` pictures of `patch` by `patch` pixels: `P = frames * patch**2 *
    channels`, in this order. `grids` `[B, n, 3]` are frames (of patches), rows and columns,
    as `data.native.rows` makes them; what padding holds does not matter. Heads turn by row
    and column. With a `window`, so many merged tokens a side, patches are laid window by
    window for the blocks that see no farther, and `order` of what pooling takes says where
    each merged token came from.

    Raises:
      ValueError: patches of another size, or a row of them that cannot be merged.
    """

    patch: int
    width: int
    head_dim: int
    side: int = 2  # patches of a merged token.
    frames: int = 2
    window: int | None = None
    position: nn.Module | None = None  # (places) -> [B, T, D], added to the patches'.
    theta: float = 1e4
    use_bias: bool = False
    channels: int = 3
    dtype: DTypeLike = jnp.bfloat16

    @property
    def size(self) -> int:
        """How many numbers a patch has."""
        return self.frames * self.patch**2 * self.channels

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "B T P"],
        grids: Int[Array, "B n 3"],
        *,
        train: bool = False,
    ) -> Tokens:
        _, T, P = patches.shape
        if self.size != P:
            raise ValueError(
                f"patches have {P} numbers; the model takes {self.frames} * {self.patch} * "
                f"{self.patch} * {self.channels} channels"
            )
        unit = self.side**2
        if T % unit:
            raise ValueError(f"a row of {T} patches must be a multiple of {unit}")
        at = blocks(grids, T, self.side)
        # A NaN in padding would reach the gradient of every kernel by a product with 0.
        patches = jnp.where((at.ids > 0)[..., None], patches, 0)
        linear = Einsum(
            "BTP,PD->BTD", {"D": self.width}, self.use_bias, self.dtype, name="patch"
        )
        x = linear(patches)
        if self.position is not None:
            x += self.position(at).astype(self.dtype)
        angles = angles_2d(at.y, at.x, self.head_dim, self.theta)
        if self.window is None:
            block = {"angles": angles, "mask": Segments(at.ids)}
            return Tokens(constrain(x, "BTD"), block)
        near = windows(at, self.side * self.window)
        order = jnp.argsort(jnp.where(near == 0, jnp.iinfo(near.dtype).max, near)[:, ::unit])
        x, angles = (regroup(a, order, unit) for a in (x, angles))
        ids, near = (regroup(a[..., None], order, unit)[..., 0] for a in (at.ids, near))
        block = {"angles": angles, "mask": Segments(ids), "near": Segments(near)}
        return Tokens(constrain(x, "BTD"), block, {"order": order})


class CornerPosition(nn.Module):
    """Learned positions of a grid of `shape`, resized to each image's with corners aligned."""

    width: int
    shape: tuple[int, int]

    @nn.compact
    def __call__(self, at: Places) -> Float[Array, "B T D"]:
        rows, columns = self.shape
        init = partitioned(nn.initializers.normal(0.02), "TD")
        table = self.param("embedding", init, (rows * columns, self.width))
        return resize(table.reshape(rows, columns, -1), at, corner_weights)


def regroup(
    x: Float[Array, "B T D"] | Int[Array, "B T D"], order: Int[Array, "B s"], unit: int
) -> Float[Array, "B T D"] | Int[Array, "B T D"]:
    """Groups of `unit` tokens that stand side by side, taken in another order."""
    B, T, D = x.shape
    groups = x.reshape(B, T // unit, unit * D)
    return jnp.take_along_axis(groups, order[..., None], 1).reshape(B, T, D)


class NearBlock(Block):
    """A block that sees its window where it is `local`, or else all of its image.

    `near` and `mask` are the two masks, of which it takes one.
    """

    local: bool = True

    def __call__(
        self, x: Float[Array, "B T D"], *, mask: Mask, near: Mask, **inputs
    ) -> Float[Array, "B T D"]:
        return super().__call__(x, mask=near if self.local else mask, **inputs)


class Fold(nn.Module):
    """Each `count` tokens that stand side by side as one of `count` times the channels."""

    count: int = 4

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B s E"]:
        B, T, C = x.shape
        return x.reshape(B, T // self.count, self.count * C)
