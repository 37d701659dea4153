"""Diffusion transformer: noisy images or latents, a time and a class to what a law asks for.

Sources: Peebles and Xie 2022 (arXiv 2212.09748, DiT), Yao and Wang 2025 (2501.01423,
LightningDiT) for RMSNorm, SwiGLU and rotary positions, Li and He 2025 (2511.13720, JiT) for
pixels through a bottleneck and tokens of the class among those of the image.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Remat, Stack
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import Embedding, GridAngles, PatchEmbed, SincosPosition
from jaxformer.layers.norm import BareLayerNorm, LayerNorm, RMSNorm
from jaxformer.layers.timestep import AdaBlock, AdaNorm, TimestepEmbed
from jaxformer.ops.activation import gelu_tanh, silu
from jaxformer.ops.patches import sincos_at, unpatchify
from jaxformer.ops.timestep import cosines_first


@dataclasses.dataclass(frozen=True)
class Size:
    """What a named size fixes."""

    width: int
    depth: int
    num_heads: int


SIZES = {
    "S": Size(384, 12, 6),
    "B": Size(768, 12, 12),
    "L": Size(1024, 24, 16),
    "XL": Size(1152, 28, 16),
}


def named(name: str, **fields) -> "DiT":
    """A DiT by its usual name: `named("XL/2", learned_variance=True)`; other fields as given.

    Raises:
      ValueError: it is no SIZE/PATCH of a size that is known.
    """
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdecimal():
        raise ValueError(
            f"{name!r} is no DiT; write SIZE/PATCH with a size of {', '.join(SIZES)}"
        )
    return DiT(**{**dataclasses.asdict(SIZES[size]), "patch": int(patch), **fields})


class Given(NamedTuple):
    """What blocks are told: one vector of a row, and tokens that stand before the image's."""

    condition: Float[Array, "B 1 D"]
    context: Float[Array, "B S D"] | None = None


class ClassCondition(nn.Module):
    """A time and a class as the sum of their vectors.

    The table has a row for each class and a last one, `num_classes`, for none: that is what
    a label of None stands for, and in training each label with the chance `dropout`, drawn
    from the random stream "dropout". A label that is in no row makes NaN. With `tokens` the
    class stands before the image as so many tokens too, each with a learned position, and
    with `timed` the time before those, for blocks that learn of it in no other way.
    """

    width: int
    num_classes: int
    dropout: float = 0.1
    tokens: int = 0
    timed: bool = False
    features: Callable[..., Array] = cosines_first
    scale: float = 1e3  # of times, see `TimestepEmbed`.
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, t: Float[Array, " B"], label: Int[Array, " B"] | None, *, train: bool = False
    ) -> Given:
        D, none = self.width, self.num_classes
        how = {"scale": self.scale, "features": self.features, "dtype": self.dtype}
        time = TimestepEmbed(D, name="time", **how)(t)
        table = Embedding(D, "VD", name="label")(none + 1)
        if label is None:
            label = jnp.full(t.shape, none)
        if train and self.dropout:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), self.dropout, t.shape)
            label = jnp.where(dropped, none, label)
        label = jnp.where(label < 0, none + 1, label)  # Or it would count from the end.
        row = table.at[label].get(mode="fill", fill_value=jnp.nan).astype(self.dtype)
        context = None
        if self.tokens:
            place = Embedding(D, name="position")(self.tokens).astype(self.dtype)
            context = row[:, None] + place[None]
            if self.timed:
                context = jnp.concatenate([time[:, None], context], 1)
        return Given((time + row)[:, None], context)


class StretchedPosition(nn.Module):
    """Sines and cosines of a grid of `shape`, (rows, columns), stretched over any other.

    Source: diffusers, `PatchEmbed`.
    """

    width: int
    shape: tuple[int, int]

    def __call__(self, y: int, x: int) -> Float[Array, "T D"]:
        rows, columns = (np.arange(n) * m / n for n, m in zip((y, x), self.shape, strict=True))
        return jnp.asarray(sincos_at(rows, columns, self.width, endpoint=False))


class BottleneckEmbed(PatchEmbed):
    """Patches through fewer numbers than they have, for large ones of pixels. Source: JiT."""

    bottleneck: int = 128

    def project(self, patches: Float[Array, "B T P"]) -> Float[Array, "B T D"]:
        """Patches as vectors of the width."""
        sizes = {"C": self.bottleneck}
        narrow = Einsum("BTP,PC->BTC", sizes, False, self.dtype, name="narrow")
        sizes = {"D": self.width}
        widen = Einsum("BTC,CD->BTD", sizes, self.use_bias, self.dtype, name="patch")
        return widen(narrow(patches))


class Denoiser(nn.Module):
    """Images `[B, Y, X, C]`, times and classes to images of `channels`, by parts.

    `condition` makes `Given` of times and classes. The tokens of its context, if it has
    any, come in before `stack`, after `first`, and are gone when `norm` and `head` make
    patches of what is left. `told` is whether blocks take the condition.
    """

    embed: PatchEmbed
    condition: nn.Module
    stack: nn.Module
    norm: nn.Module  # (tokens, condition), such as layers.timestep.AdaNorm.
    channels: int
    first: nn.Module | None = None
    told: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self):
        zeros, sizes = nn.initializers.zeros, {"P": self.embed.patch**2 * self.channels}
        self.head = Einsum("BTD,DP->BTP", sizes, True, self.dtype, zeros)

    def __call__(
        self,
        x: Float[Array, "B Y X C"],
        t: Float[Array, "B ..."],
        label: Int[Array, " B"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B Y X O"]:
        return self.with_early(x, t, label, train=train)[0]

    def with_early(
        self, x: Float[Array, "B Y X C"], t: Float[Array, "B ..."], label=None, *, train=False
    ) -> tuple[Float[Array, "B Y X O"], Float[Array, "B T D"]]:
        """The same, and the image's tokens between `first` and `stack`."""
        tokens, condition, early = self._run(x, t, label, train)
        patches = self.head(self.norm(tokens, condition)).astype(jnp.float32)
        return unpatchify(patches, self.embed.patch, (x.shape[1], x.shape[2])), early

    def encode(
        self,
        x: Float[Array, "B Y X C"],
        t: Float[Array, " B"],
        label: Int[Array, " B"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """The image's tokens after the last block."""
        return self._run(x, t, label, train)[0]

    def _run(self, x, t, label, train):
        condition, context = self.condition(t, label, train=train)
        x, inputs, _ = self.embed(x, train=train)
        inputs, T = {**inputs, "train": train}, x.shape[1]
        if self.told:
            inputs["condition"] = condition
        if self.first is not None:
            x = self.first(x, **inputs)
        early = x
        if context is not None:
            x = jnp.concatenate([context.astype(x.dtype), x], 1)
            if "angles" in inputs:
                lead = (0, 0), (context.shape[1], 0), (0, 0)
                inputs["angles"] = jnp.pad(inputs["angles"], lead)
        return self.stack(x, **inputs)[:, -T:], condition, early


class DiT(nn.Module):
    """Diffusion transformer by its numbers; `parts()` is the same as a `Denoiser`.

    `model.apply({"params": params}, x, t, label)` gives images like `x` `[B, Y, X, C]`, or
    of `2 C` channels with `learned_variance`: what is learned of the mean, and then of the
    variance. Positions are of images of `size`, (rows, columns), and stretched for others;
    without `size` they are counted from 0, for those of one size. Labels are 0 to
    `num_classes - 1`, and `num_classes` or None for no class at all. Times go from 0 (data)
    to 1 (noise) and are told in thousandths: step k of the 1000 of DDPM, counted from 0, is
    `t = k / 1000`. Parameters start so that the result is 0.

    LightningDiT is `norm=RMSNorm, gated=True, rotary=True`. JiT is that with `qk_norm`,
    `bottleneck=128, context=32, context_from=4` and a patch of 16 pixels or more; what it
    gives is then taken for the image itself. In-context conditioning alone is
    `adaptive=False, context=1`.
    """

    width: int
    depth: int
    num_heads: int
    patch: int
    channels: int = 4
    num_classes: int = 1000
    size: tuple[int, int] | None = None
    learned_variance: bool = False
    mlp_ratio: float = 4.0  # of the width; a gated MLP has two thirds of it.
    norm: Callable[..., nn.Module] = BareLayerNorm
    epsilon: float = 1e-6
    gated: bool = False
    rotary: bool = False
    qk_norm: bool = False
    adaptive: bool = True
    context: int = 0  # tokens of the class.
    context_from: int = 0  # the layer before which they come in.
    bottleneck: int | None = None
    label_dropout: float = 0.1
    drop_path: float = 0.0
    remat: Remat = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.denoiser = self.parts()
        nn.share_scope(self, self.denoiser)  # Its parameters are this module's.

    def __call__(
        self,
        x: Float[Array, "B Y X C"],
        t: Float[Array, "B ..."],
        label: Int[Array, " B"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B Y X O"]:
        return self.denoiser(x, t, label, train=train)

    def encode(
        self,
        x: Float[Array, "B Y X C"],
        t: Float[Array, " B"],
        label: Int[Array, " B"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """The image's tokens after the last block."""
        return self.denoiser.encode(x, t, label, train=train)

    def parts(self) -> Denoiser:
        """The parts that these numbers stand for.

        Raises:
          ValueError: heads that do not divide the width; blocks that learn of time and
            class in no way; a layer that is none.
        """
        D, dtype = self.width, self.dtype
        if D % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide width={D}")
        if not self.adaptive and not self.context:
            raise ValueError("adaptive=False needs context=1 or more: how else to know a class")
        if not 0 <= self.context_from < self.depth:
            raise ValueError(
                f"context_from={self.context_from} must be a layer, below depth={self.depth}"
            )
        if not self.adaptive and self.context_from:
            raise ValueError("adaptive=False needs context_from=0: how else to know the time")
        rotary = GridAngles(D // self.num_heads, 1e4, parent=None) if self.rotary else None
        position = SincosPosition(D, endpoint=False, parent=None)
        if self.size is not None:
            shape = (self.size[0] // self.patch, self.size[1] // self.patch)
            position = StretchedPosition(D, shape, parent=None)
        fields: dict[str, Any] = {
            "position": position,
            "rotary": rotary,
            "channels": self.channels,
            "dtype": dtype,
            "parent": None,
        }
        embed = PatchEmbed(self.patch, D, **fields)
        if self.bottleneck is not None:
            embed = BottleneckEmbed(self.patch, D, bottleneck=self.bottleneck, **fields)
        condition = ClassCondition(
            D,
            self.num_classes,
            self.label_dropout,
            self.context,
            not self.adaptive,
            dtype=dtype,
            parent=None,
        )
        before, after = (
            Stack(self._block(), depth, self.remat, self.unroll, rates, parent=None)
            for depth, rates in self._depths()
        )
        return Denoiser(
            embed,
            condition,
            after,
            AdaNorm(self.norm(epsilon=self.epsilon, parent=None), parent=None),
            self.channels * (2 if self.learned_variance else 1),
            before if before.depth else None,
            self.adaptive,
            dtype,
            parent=None,
        )

    def _depths(self) -> list[tuple[int, float | tuple[float, ...]]]:
        """Layers before and after the context, and the rate at which each is left out."""
        if not self.drop_path:
            return [(self.context_from, 0.0), (self.depth - self.context_from, 0.0)]
        last = max(self.depth - 1, 1)
        rates = tuple(self.drop_path * i / last for i in range(self.depth))
        cut = self.context_from
        return [(cut, rates[:cut]), (self.depth - cut, rates[cut:])]

    def _block(self) -> Block:
        attention = Attention(
            self.num_heads,
            self.width // self.num_heads,
            qk_norm=RMSNorm if self.qk_norm else None,
            use_bias=True,
            dtype=self.dtype,
            parent=None,
        )
        mlp = Mlp(
            mlp_width(self),
            silu if self.gated else gelu_tanh,
            self.gated,
            use_bias=True,
            dtype=self.dtype,
            parent=None,
        )
        if self.adaptive:
            return AdaBlock(attention, mlp, self.norm, self.epsilon, parent=None)
        norm = LayerNorm if self.norm is BareLayerNorm else self.norm
        return Block(attention, mlp, norm, self.epsilon, parent=None)


def mlp_width(model: DiT) -> int:
    """The width of the MLP's middle."""
    wide = int(model.mlp_ratio * model.width)
    return int(2 * wide / 3) if model.gated else wide


def flops(model: DiT, shape: tuple[int, int, int] = (32, 32, 4), *_) -> int:
    """Floating-point operations of one image forward: 2 for each multiply-add.

    Counts the products of matrices alone; a label costs none. A training step costs three
    times as much.
    """
    Y, X, C = shape
    D, F = model.width, mlp_width(model)
    patches = (Y // model.patch) * (X // model.patch)
    P = model.patch**2 * C
    total = 256 * D + D * D + 2 * D * D  # Of the time and of the last norm.
    total += patches * D * P * (2 if model.learned_variance else 1)
    if model.bottleneck is None:
        total += patches * P * D
    else:
        total += patches * model.bottleneck * (P + D)
    more = model.context + (not model.adaptive)
    for layer in range(model.depth):
        T = patches + (more if layer >= model.context_from else 0)
        total += 4 * T * D * D + 2 * T * T * D + (3 if model.gated else 2) * T * D * F
        total += 6 * D * D if model.adaptive else 0
    return 2 * total
