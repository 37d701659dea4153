"""Video transformers: frames to tubelets, with positions in time and in space.

Attention is over all tubelets at once, or factored into space and time. Source: Arnab et al.
2021, "ViViT", arXiv 2103.15691, of which these are models 1, 2 and 3.
"""

import math
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Remat, Stack, drop_path
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import Embedding, GridPosition, SincosPosition, Tokens
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import Average, First
from jaxformer.models import vit
from jaxformer.models.vit import Encoder, Numbers
from jaxformer.ops.patches import sincos_1d, tubelets
from jaxformer.sharding import constrain, partitioned

SIZES = {name: vit.SIZES[name] for name in ("B", "L", "H")}


def named(name: str, **fields) -> "ViViT":
    """A ViViT by its usual name: `named("B/16x2")` has tubelets of 16 x 16 in 2 frames."""
    size, _, rest = name.partition("/")
    patch, _, tubelet = rest.partition("x")
    if size not in SIZES or not (patch.isdecimal() and tubelet.isdecimal()):
        raise ValueError(
            f"{name!r} is no ViViT; write SIZE/PATCHxFRAMES with a size of {', '.join(SIZES)}"
        )
    numbers = {"patch": int(patch), "tubelet": int(tubelet)}
    return ViViT(**{**vars(SIZES[size]), **numbers, **fields})


class JointPosition(nn.Module):
    """Learned positions of each place of each time: a table `[prefix + f * y * x, D]`.

    `shape` is (times, rows, columns), in tubelets; without it, that of what comes.
    """

    width: int
    shape: tuple[int, int, int] | None = None
    prefix: int = 0

    @nn.compact
    def __call__(self, f: int, y: int, x: int) -> Float[Array, "T D"]:
        shape = self.shape or (f, y, x)
        if shape != (f, y, x):
            raise ValueError(f"positions are of {shape} tubelets, the video has {(f, y, x)}")
        init = partitioned(nn.initializers.normal(0.02), "TD")
        return self.param("embedding", init, (self.prefix + math.prod(shape), self.width))


class FactoredPosition(nn.Module):
    """The position of place s at time t is `time[t] + space[s]`.

    `time` is called with (1, times) and `space` with (rows, columns). `GridPosition`s serve
    for both, and resize where a video is longer or larger than their table.
    """

    space: nn.Module
    time: nn.Module | None = None  # None: all times are alike.

    def __call__(self, f: int, y: int, x: int) -> Float[Array, "T D"]:
        space = self.space(y, x)
        time = jnp.zeros((f, 1)) if self.time is None else self.time(1, f)
        return (time[:, None] + space[None]).reshape(f * y * x, -1)


class RowSincos(nn.Module):
    """Fixed sines and cosines of the number of a token, see `ops.patches.sincos_1d`."""

    width: int

    def __call__(self, *grid: int) -> Float[Array, "T D"]:
        return jnp.asarray(sincos_1d(math.prod(grid), self.width))


class TubeletEmbed(nn.Module):
    """Videos as tokens: tubelets, projected, after `prefix` learned tokens.

    Time is slowest, then rows. `position` is called with (times, rows, columns) and gives
    what is added: to each tubelet, and to the tokens before them if it has rows for these.
    `size` is that of the videos it is made for: frames, rows and columns of pixels.
    """

    tubelet: int
    patch: int
    width: int
    position: nn.Module
    prefix: int = 0
    size: tuple[int, int, int] | None = None
    channels: int | None = None  # None: any number.
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, frames: Float[Array, "B F Y X C"], *, train: bool = False) -> Tokens:
        B, F, Y, X, C = frames.shape
        if self.channels not in (None, C):
            raise ValueError(f"videos have {C} channels; the model takes {self.channels}")
        sizes = {"D": self.width}
        x = tubelets(frames, self.tubelet, self.patch)
        x = Einsum("BTP,PD->BTD", sizes, True, self.dtype, name="patch")(x)
        T = x.shape[1]
        position = self.position(F // self.tubelet, Y // self.patch, X // self.patch)
        x += position[-T:].astype(self.dtype)[None]
        if self.prefix:
            cls = Embedding(self.width, name="cls")(self.prefix)
            own = position[:-T]  # Rows of the prefix, or none.
            cls = (cls + own if len(own) else cls).astype(self.dtype)
            cls = jnp.broadcast_to(cls, (B, *cls.shape))
            x = jnp.concatenate([cls, x], 1)
        return Tokens(constrain(x, "BTD"))


class FramedEmbed(TubeletEmbed):
    """`TubeletEmbed` that tells the blocks how many times there are, for `SpaceTimeBlock`."""

    def __call__(self, frames: Float[Array, "B F Y X C"], *, train: bool = False) -> Tokens:
        tokens = super().__call__(frames, train=train)
        return tokens._replace(block={"times": frames.shape[1] // self.tubelet})


class TimesEmbed(nn.Module):
    """Videos as one token for each time: the features of an encoder of space.

    Every `tubelet` frames are a video of their own to `space`. `position` is called with
    (1, times), and learned tokens stand before, as in `TubeletEmbed`.
    """

    space: Encoder
    tubelet: int
    position: nn.Module
    prefix: int = 0

    @nn.compact
    def __call__(self, frames: Float[Array, "B F Y X C"], *, train: bool = False) -> Tokens:
        B, F, *image = frames.shape
        if F % self.tubelet:
            raise ValueError(f"tubelet={self.tubelet} must divide the video's {F} frames")
        f = F // self.tubelet
        apart = frames.reshape(B * f, self.tubelet, *image)
        x = self.space.features(apart, train=train).reshape(B, f, -1)
        x += self.position(1, f).astype(x.dtype)[None]
        if self.prefix:
            cls = Embedding(x.shape[-1], name="cls")(self.prefix).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (B, *cls.shape)), x], 1)
        return Tokens(constrain(x, "BTD"))


class SpaceAttention(Attention):
    """Attention of each time's tokens to each other; `times` lie one after the other."""

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "B T D"], *, times: int
    ) -> Float[Array, "B T D"]:
        B, T, D = x.shape
        return super().__call__(x.reshape(B * times, T // times, D)).reshape(B, T, D)


class TimeAttention(Attention):
    """Attention of each place's tokens, of all times, to each other."""

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "B T D"], *, times: int
    ) -> Float[Array, "B T D"]:
        B, T, D = x.shape
        x = x.reshape(B, times, T // times, D).swapaxes(1, 2)
        x = super().__call__(x.reshape(-1, times, D))
        return x.reshape(B, T // times, times, D).swapaxes(1, 2).reshape(B, T, D)


class SpaceTimeBlock(nn.Module):
    """Pre-norm residual block: attention in space, attention in time, MLP."""

    space: nn.Module
    time: nn.Module
    mlp: nn.Module
    epsilon: float = 1e-6  # of the norms.

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        train: bool = False,
        drop_path_rate: float | Float[Array, ""] | None = None,
        **inputs,
    ) -> Float[Array, "B T D"]:
        def branch(name: str, **inputs) -> Array:
            y = LayerNorm(self.epsilon, name=f"{name}_norm")(x)
            y = getattr(self, name)(y, **inputs)
            if train and drop_path_rate is not None:
                y = drop_path(y, drop_path_rate, self.make_rng("dropout"))
            return y

        x = constrain(x, "BTD")
        x += branch("space", **inputs)
        x += branch("time", **inputs)
        return constrain(x + branch("mlp", train=train), "BTD")


class ViViT(Numbers):
    """Video transformer by its numbers; `parts()` is the same as an `Encoder`.

    `model.apply({"params": params}, frames)` with frames `[B, F, Y, X, C]` gives logits
    `[B, V]`; with `num_classes=0` it gives the pooled features `[B, D]`.

    `attention` is over all tokens ("joint", model 1 of the paper), by one encoder of each
    time's space and another of `time_depth` layers over the times ("encoders", model 2), or
    in each block first in space and then in time ("blocks", model 3, without a class
    token). `size` is (frames, rows, columns) in pixels of learned positions; without it
    they are of the videos that come.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch: int
    tubelet: int = 2
    num_classes: int = 400
    size: tuple[int, int, int] | None = None
    positions: Literal["factored", "joint", "sincos"] = "factored"
    attention: Literal["joint", "encoders", "blocks"] = "joint"
    time_depth: int = 4  # of "encoders" alone.
    pool: Literal["cls", "gap"] = "gap"
    channels: int | None = None  # None: any number.
    drop_path: float = 0.0
    remat: Remat = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def parts(self) -> Encoder:
        """The parts that these numbers stand for.

        Raises:
          ValueError: heads that do not divide the width; parts that do not go together.
        """
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide width={self.width}")
        for name, known in (
            ("pool", ("cls", "gap")),
            ("positions", ("factored", "joint", "sincos")),
            ("attention", ("joint", "encoders", "blocks")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}"
                )
        if self.attention == "blocks" and self.pool == "cls":
            raise ValueError("attention='blocks' has no class token; use pool='gap'")
        if self.attention == "encoders" and self.positions == "joint":
            raise ValueError("attention='encoders' takes positions 'factored' or 'sincos'")
        if self.attention == "encoders":
            space = self._encoder(self._embed(TubeletEmbed), self.depth)
            prefix, time = int(self.pool == "cls"), self._time()
            embed = TimesEmbed(space, self.tubelet, time, prefix, parent=None)
            return self._encoder(embed, self.time_depth, self.num_classes)
        kind = FramedEmbed if self.attention == "blocks" else TubeletEmbed
        return self._encoder(self._embed(kind), self.depth, self.num_classes)

    def _encoder(self, embed: nn.Module, depth: int, num_classes: int = 0) -> Encoder:
        return Encoder(
            embed,
            Stack(self._block(), depth, self.remat, self.unroll, self.drop_path, parent=None),
            LayerNorm(parent=None),
            First(parent=None) if self.pool == "cls" else Average(parent=None),
            num_classes=num_classes,
            dtype=self.dtype,
            parent=None,
        )

    def _embed(self, kind: type[TubeletEmbed]) -> TubeletEmbed:
        D, prefix, shape = self.width, int(self.pool == "cls"), self._shape()
        if self.positions == "joint":
            position = JointPosition(D, shape, prefix, parent=None)
        else:
            space = GridPosition(D, shape and (shape[1], shape[2]), parent=None)
            if self.positions == "sincos":
                space = SincosPosition(D, parent=None)
            time = None if self.attention == "encoders" else self._time()
            position = FactoredPosition(space, time, parent=None)
        options = {"size": self.size, "channels": self.channels, "dtype": self.dtype}
        return kind(self.tubelet, self.patch, D, position, prefix, **options, parent=None)

    def _time(self) -> nn.Module:
        """Positions of the times; for more or fewer of them they are resized linearly."""
        if self.positions == "sincos":
            return RowSincos(self.width, parent=None)
        shape = self._shape()
        shape = shape and (1, shape[0])
        return GridPosition(self.width, shape, method="bilinear", parent=None)

    def _shape(self) -> tuple[int, int, int] | None:
        if self.size is None:
            return None
        F, Y, X = self.size
        return (F // self.tubelet, Y // self.patch, X // self.patch)

    def _block(self) -> nn.Module:
        D, N = self.width, self.num_heads
        same = {"use_bias": True, "dtype": self.dtype, "parent": None}
        mlp = Mlp(self.mlp_dim, **same)
        if self.attention != "blocks":
            return Block(Attention(N, D // N, **same), mlp, parent=None)
        space, time = (kind(N, D // N, **same) for kind in (SpaceAttention, TimeAttention))
        return SpaceTimeBlock(space, time, mlp, parent=None)


def flops(model: ViViT, shape: tuple[int, int, int, int] = (32, 224, 224, 3)) -> int:
    """Floating-point operations of one video forward, as `models.vit.flops` counts them."""
    F, Y, X, C = shape
    f, s, D = F // model.tubelet, (Y // model.patch) * (X // model.patch), model.width
    cls, tubelet = int(model.pool == "cls"), model.tubelet * model.patch**2 * C

    def attention(rows: int, tokens: int) -> int:
        return rows * (4 * tokens * D * D + 2 * tokens**2 * D)

    def mlp(tokens: int) -> int:
        return 2 * tokens * D * model.mlp_dim

    if model.attention == "joint":
        blocks = model.depth * (attention(1, f * s + cls) + mlp(f * s + cls))
    elif model.attention == "encoders":
        blocks = model.depth * (attention(f, s + cls) + mlp(f * (s + cls)))
        blocks += model.time_depth * (attention(1, f + cls) + mlp(f + cls))
    else:
        blocks = model.depth * (attention(f, s) + attention(s, f) + mlp(f * s))
    return 2 * (f * s * tubelet * D + blocks + D * model.num_classes)
