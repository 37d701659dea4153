"""MMDiT: noisy latents, a time and a text to a velocity, in two streams of one attention.

Sources: Esser et al. 2024 (arXiv 2403.03206, Stable Diffusion 3) and Wu et al. 2025
(2508.02324, Qwen-Image), in which positions of image and text turn on three axes (MSRoPE).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Chain, Mlp, Remat, Stack
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import Embedding, PatchEmbed
from jaxformer.layers.joint import JointBlock, ScaleNorm
from jaxformer.layers.norm import BareLayerNorm, RMSNorm
from jaxformer.layers.timestep import TimestepEmbed
from jaxformer.ops.activation import gelu_tanh, silu
from jaxformer.ops.mask import Segments
from jaxformer.ops.patches import sincos_at, unpatchify
from jaxformer.ops.rotary import angles_of_axes, centered_places
from jaxformer.sharding import partitioned

SIZES: dict[str, dict[str, Any]] = {
    "sd3-medium": {"depth": 24, "num_heads": 24},
    "sd3.5-medium": {
        "depth": 24,
        "num_heads": 24,
        "qk_norm": True,
        "own_layers": 13,
        "table": 384,
    },
    "sd3.5-large": {"depth": 38, "num_heads": 38, "qk_norm": True},
    "qwen-image": {
        "depth": 60,
        "num_heads": 24,
        "head_dim": 128,
        "text_width": 3584,
        "pooled_width": None,
        "table": None,
        "qk_norm": True,
    },
}


def named(name: str, **fields) -> "MMDiT":
    """An MMDiT by its usual name; other fields as given.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in SIZES:
        raise ValueError(f"{name!r} is no MMDiT; known are {', '.join(SIZES)}")
    return MMDiT(**{**SIZES[name], **fields})


class CroppedPosition(nn.Module):
    """The middle of a square table of positions, `side` by `side`, kept with the parameters.

    It starts as sines and cosines of a grid of `base` by `base` stretched over it, and gets
    no gradient. An image that is larger is refused. Source: Stable Diffusion 3.
    """

    width: int
    side: int
    base: int

    @nn.compact
    def __call__(self, y: int, x: int) -> Float[Array, "T D"]:
        if max(y, x) > self.side:
            raise ValueError(
                f"{y} x {x} patches are more than the table of positions has, {self.side} x "
                f"{self.side}; make images smaller"
            )

        def waves(*_) -> Array:
            places = np.arange(self.side) * self.base / self.side
            return jnp.asarray(sincos_at(places, places, self.width, endpoint=False))

        table = jax.lax.stop_gradient(self.param("bias", partitioned(waves, "TD")))
        top, left = (self.side - y) // 2, (self.side - x) // 2
        table = table.reshape(self.side, self.side, -1)
        return table[top : top + y, left : left + x].reshape(y * x, -1)


class JointAngles(nn.Module):
    """Rotary angles of image and text on three axes, see `ops.rotary.centered_places`."""

    sizes: tuple[int, ...] = (16, 56, 56)  # of a head's numbers, by axis.
    theta: float = 1e4

    def __call__(self, y: int, x: int, text: int) -> Float[Array, "T h"]:
        places = centered_places(y, x, text)
        parts = [angles_of_axes(tuple(p), self.sizes, self.theta) for p in places]
        return jnp.concatenate(parts)


class TextCondition(nn.Module):
    """A time, and a vector of the whole text where a model takes one, as one vector."""

    width: int
    pooled_width: int | None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, t: Float[Array, " B"], pooled: Float[Array, "B P"] | None
    ) -> Float[Array, "B 1 D"]:
        if (pooled is None) != (self.pooled_width is None):
            need = "no pooled vector" if self.pooled_width is None else "a pooled vector"
            raise ValueError(f"the model takes {need} of the text beside its tokens")
        found = TimestepEmbed(self.width, dtype=self.dtype, name="time")(t)
        if pooled is not None:
            up = Einsum("BP,PD->BD", {"D": self.width}, True, self.dtype, name="text_up")
            down = Einsum("BC,CD->BD", {"D": self.width}, True, self.dtype, name="text_down")
            if pooled.shape[-1] != self.pooled_width:
                raise ValueError(
                    f"pooled has {pooled.shape[-1]} numbers; the model takes "
                    f"{self.pooled_width}"
                )
            found += down(silu(up(pooled)))
        return found[:, None]


class TextEmbed(nn.Module):
    """Vectors of another model's tokens, normed or not, in this model's width."""

    width: int
    text_width: int
    norm: nn.Module | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, text: Float[Array, "B S C"]) -> Float[Array, "B S D"]:
        if text.shape[-1] != self.text_width:
            raise ValueError(
                f"texts have vectors of {text.shape[-1]} numbers; the model takes "
                f"{self.text_width}"
            )
        text = text if self.norm is None else self.norm(text)
        linear = Einsum("BSC,CD->BSD", {"D": self.width}, True, self.dtype, name="linear")
        return linear(text)


class Letters(nn.Module):
    """Ids of letters or tokens as learned vectors: a text that no other model has read."""

    width: int
    vocab: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, text: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        return Embedding(self.width, "VD", name="letter")(self.vocab)[text].astype(self.dtype)


class TextDenoiser(nn.Module):
    """Images `[B, Y, X, C]`, times and texts to images of `channels`, by parts.

    `stack` is of blocks of two streams, see `layers.joint`; `angles`, where it is given,
    says how all tokens turn.
    """

    embed: PatchEmbed
    text: nn.Module
    condition: nn.Module
    stack: nn.Module
    norm: nn.Module
    channels: int
    angles: nn.Module | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self):
        zeros, sizes = nn.initializers.zeros, {"P": self.embed.patch**2 * self.channels}
        self.head = Einsum("BTD,DP->BTP", sizes, True, self.dtype, zeros)

    def __call__(
        self,
        x: Float[Array, "B Y X C"],
        t: Float[Array, " B"],
        text: Float[Array, "B S E"] | Int[Array, "B S"],
        pooled: Float[Array, "B P"] | None = None,
        real: Bool[Array, "B S"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B Y X O"]:
        condition = self.condition(t, pooled)
        tokens = self.embed(x, train=train).x
        y = self.text(text)
        (B, T), S = tokens.shape[:2], text.shape[1]
        inputs: dict[str, Any] = {"image": T, "condition": condition, "train": train}
        if self.angles is not None:
            grid = (x.shape[1] // self.embed.patch, x.shape[2] // self.embed.patch)
            inputs["angles"] = self.angles(*grid, S)[None]
        if real is not None:
            ones = jnp.ones((B, T + S), jnp.int32)
            inputs["mask"] = Segments(ones, ones.at[:, T:].set(real.astype(jnp.int32)))
        tokens = self.stack(jnp.concatenate([tokens, y], 1), **inputs)[:, :T]
        patches = self.head(self.norm(tokens, condition)).astype(jnp.float32)
        return unpatchify(patches, self.embed.patch, (x.shape[1], x.shape[2]))


class MMDiT(nn.Module):
    """MMDiT by its numbers; `parts()` is the same as a `TextDenoiser`.

    `model.apply({"params": params}, x, t, text, pooled, real)` gives what is learned of `x`
    `[B, Y, X, C]`, a velocity in all that are known: noise less data. Times go from 0 (data)
    to 1 (noise). `text` `[B, S, text_width]` are the last states of a model of texts, of
    which `real` `[B, S]` says what is none of padding (at one end); `pooled`
    `[B, pooled_width]` is one vector of each text. With a `vocab` the text is ids `[B, S]` of
    so many letters or tokens, read by no other model. Any height and width that patches
    divide: positions are the middle of a table of `table` by `table` patches, or, without
    one, angles on the `axes` of frame, row and column, in Qwen-Image's way. Then the last
    block is like all others; else it only looks at its text.
    """

    depth: int
    num_heads: int
    head_dim: int = 64
    patch: int = 2
    channels: int = 16
    text_width: int = 4096
    pooled_width: int | None = 2048
    table: int | None = 192
    base: int = 64  # patches over which the table's positions count to their full.
    axes: tuple[int, ...] = (16, 56, 56)
    qk_norm: bool = False
    own_layers: int = 0  # the first, in which the image looks at itself once more.
    mlp_ratio: int = 4
    vocab: int | None = None
    remat: Remat = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.denoiser = self.parts()
        nn.share_scope(self, self.denoiser)  # Its parameters are this module's.

    def __call__(
        self,
        x: Float[Array, "B Y X C"],
        t: Float[Array, " B"],
        text: Float[Array, "B S E"] | Int[Array, "B S"],
        pooled: Float[Array, "B P"] | None = None,
        real: Bool[Array, "B S"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B Y X O"]:
        return self.denoiser(x, t, text, pooled, real, train=train)

    def parts(self) -> TextDenoiser:
        """The parts that these numbers stand for.

        Raises:
          ValueError: axes that do not fill a head; more own layers than there are.
        """
        D, dtype = self.num_heads * self.head_dim, self.dtype
        if self.table is None and sum(self.axes) != self.head_dim:
            raise ValueError(f"axes={self.axes} must sum to head_dim={self.head_dim}")
        position = angles = None
        if self.table is not None:
            position = CroppedPosition(D, self.table, self.base, parent=None)
        else:
            angles = JointAngles(self.axes, parent=None)
        norm = None if self.table else RMSNorm(parent=None)
        text = TextEmbed(D, self.text_width, norm, dtype, parent=None)
        if self.vocab is not None:
            text = Letters(D, self.vocab, dtype, parent=None)
        return TextDenoiser(
            PatchEmbed(
                self.patch, D, position, channels=self.channels, dtype=dtype, parent=None
            ),
            text,
            TextCondition(D, self.pooled_width, dtype, parent=None),
            self._stack(),
            ScaleNorm(BareLayerNorm(parent=None), parent=None),
            self.channels,
            angles,
            dtype,
            parent=None,
        )

    def _stack(self) -> nn.Module:
        last = int(self.table is not None)
        if not 0 <= self.own_layers <= self.depth - last:
            raise ValueError(
                f"own_layers={self.own_layers} must be below depth={self.depth}, and 0 or more"
            )
        plain = self.depth - self.own_layers
        kinds = [(True, False, self.own_layers), (False, False, plain - last)]
        if last:
            kinds.append((False, True, 1))
        stacks = [
            Stack(self._block(own, last), count, self.remat, self.unroll, parent=None)
            for own, last, count in kinds
            if count
        ]
        return stacks[0] if len(stacks) == 1 else Chain(tuple(stacks), parent=None)

    def _block(self, own: bool, last: bool) -> JointBlock:
        D, norm = self.num_heads * self.head_dim, RMSNorm if self.qk_norm else None
        heads: dict[str, Any] = {"num_heads": self.num_heads, "head_dim": self.head_dim}
        heads |= {"qk_norm": norm, "dtype": self.dtype, "parent": None}

        def mlp() -> Mlp:
            width = self.mlp_ratio * D
            return Mlp(width, gelu_tanh, use_bias=True, dtype=self.dtype, parent=None)

        return JointBlock(
            mlp=mlp(),
            text_mlp=None if last else mlp(),
            own=Attention(use_bias=True, **heads) if own else None,
            **heads,
        )


def flops(model: MMDiT, shape: tuple[int, int, int], text: int) -> int:
    """Floating-point operations of one image and `text` tokens forward: 2 a multiply-add.

    Counts the products of matrices alone. A training step costs three times as much.
    """
    Y, X, C = shape
    D = model.num_heads * model.head_dim
    T = (Y // model.patch) * (X // model.patch)
    P, wide = model.patch**2 * C, 2 * model.mlp_ratio
    total = T * 2 * P * D + text * model.text_width * D + 256 * D + D * D + 2 * D * D
    total += (model.pooled_width + D) * D if model.pooled_width else 0
    total -= text * model.text_width * D if model.vocab else 0
    layer = (T + text) * (4 + wide) * D * D + 2 * (T + text) ** 2 * D + 12 * D * D
    total += model.depth * layer
    total += model.own_layers * (4 * T * D * D + 2 * T * T * D + 3 * D * D)
    if model.table is not None:  # The last block gives nothing to its text.
        total -= text * (1 + wide) * D * D + 4 * D * D
    return 2 * total
