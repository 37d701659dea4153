"""Convolutions and what autoencoders of images are made of beside them."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.attention import Attention
from jaxformer.ops.activation import silu
from jaxformer.sharding import constrain, partitioned

fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Conv(nn.Module):
    """A square convolution; `padding` is (before, after) of rows and of columns alike.

    The kernel is `[rows, columns, in, out]`, whole on every device.
    """

    width: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B y x O"]:
        shape = (self.size, self.size, x.shape[-1], self.width)
        kernel = self.param("kernel", partitioned(fan_in, "PQCO"), shape)
        bias = self.param("bias", partitioned(nn.initializers.zeros, "O"), (self.width,))
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            jnp.asarray(kernel, self.dtype),
            (self.stride, self.stride),
            (self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return constrain(y + bias.astype(self.dtype)[None, None, None], "BYXC")


class GroupNorm(nn.Module):
    """Normalises groups of channels over the whole image, in float32.

    Source: Wu and He 2018, arXiv 1803.08494.
    """

    groups: int = 32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        B, Y, X, C = x.shape
        if C % self.groups:
            raise ValueError(f"groups={self.groups} must divide the {C} channels")
        ones, zeros = (
            partitioned(init, "C") for init in (nn.initializers.ones, nn.initializers.zeros)
        )
        scale, bias = self.param("scale", ones, (C,)), self.param("bias", zeros, (C,))
        y = x.astype(jnp.float32).reshape(B, Y * X, self.groups, C // self.groups)
        y -= y.mean((1, 3), keepdims=True)
        y *= jax.lax.rsqrt((y**2).mean((1, 3), keepdims=True) + self.epsilon)
        y = y.reshape(x.shape) * scale[None, None, None] + bias[None, None, None]
        return y.astype(x.dtype)


class Residual(nn.Module):
    """Two convolutions, each after a norm and SiLU, added to what came in."""

    width: int
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X O"]:
        y = x
        for i in ("first", "second"):
            y = silu(GroupNorm(self.groups, name=f"{i}_norm")(y))
            y = Conv(self.width, dtype=self.dtype, name=i)(y)
        if x.shape[-1] != self.width:
            x = Conv(self.width, 1, padding=(0, 0), dtype=self.dtype, name="shortcut")(x)
        return x + y


class Look(nn.Module):
    """Attention of every place to all, in one head, added to what came in."""

    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        B, Y, X, C = x.shape
        tokens = GroupNorm(self.groups, name="norm")(x).reshape(B, Y * X, C)
        look = Attention(1, C, use_bias=True, dtype=self.dtype, name="attention")
        return x + look(tokens).reshape(x.shape)


class Middle(nn.Module):
    """Residual, attention where `looks`, residual."""

    groups: int = 32
    looks: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        width = x.shape[-1]
        x = Residual(width, self.groups, self.dtype, name="first")(x)
        if self.looks:
            x = Look(self.groups, self.dtype, name="look")(x)
        return Residual(width, self.groups, self.dtype, name="second")(x)


class Encoder(nn.Module):
    """Images to maps of `out` channels, half as large after each of `widths` but the last."""

    widths: Sequence[int]
    depth: int  # residuals at each size.
    out: int
    groups: int = 32
    looks: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B y x O"]:
        factor = 2 ** (len(self.widths) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"images of {x.shape[1]} x {x.shape[2]} must be multiples of {factor}, by "
                "which the autoencoder makes them smaller"
            )
        x = Conv(self.widths[0], dtype=self.dtype, name="start")(x)
        for i, width in enumerate(self.widths):
            for j in range(self.depth):
                x = Residual(width, self.groups, self.dtype, name=f"down_{i}_{j}")(x)
            if i + 1 < len(self.widths):
                # The original pads rows and columns after the last alone.
                x = Conv(width, 3, 2, (0, 1), self.dtype, name=f"narrow_{i}")(x)
        x = Middle(self.groups, self.looks, self.dtype, name="middle")(x)
        x = silu(GroupNorm(self.groups, name="norm")(x))
        return Conv(self.out, dtype=self.dtype, name="end")(x)


class Decoder(nn.Module):
    """The way back: maps to images of `out` channels, twice as large between `widths`.

    `widths` are those of the encoder, in its order; at each size is a residual more.
    """

    widths: Sequence[int]
    depth: int
    out: int
    groups: int = 32
    looks: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B y x C"]) -> Float[Array, "B Y X O"]:
        x = Conv(self.widths[-1], dtype=self.dtype, name="start")(x)
        x = Middle(self.groups, self.looks, self.dtype, name="middle")(x)
        for i, width in enumerate(reversed(self.widths)):
            for j in range(self.depth + 1):
                x = Residual(width, self.groups, self.dtype, name=f"up_{i}_{j}")(x)
            if i + 1 < len(self.widths):
                x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
                x = Conv(width, dtype=self.dtype, name=f"widen_{i}")(x)
        x = silu(GroupNorm(self.groups, name="norm")(x))
        return Conv(self.out, dtype=self.dtype, name="end")(x)
