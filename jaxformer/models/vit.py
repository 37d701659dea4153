"""Vision transformer: images to class logits, or to the tokens under them.

Sources: Dosovitskiy et al. 2021 (arXiv 2010.11929), Zhai et al. 2022 (2106.04560) for the
larger sizes and MAP, Darcet et al. 2024 (2309.16588) for registers, Beyer et al. 2022
(2205.01580) for sin-cos positions with average pooling.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Remat, Stack
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import GridAngles, GridPosition, PatchEmbed, SincosPosition
from jaxformer.layers.norm import LayerNorm, RMSNorm
from jaxformer.layers.pool import AttentionPool, Average, First, TanhLayer
from jaxformer.ops.activation import gelu


@dataclasses.dataclass(frozen=True)
class Size:
    """What a named size fixes."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int


SIZES = {
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "M": Size(512, 12, 2048, 8),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "So400m": Size(1152, 27, 4304, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
    "G": Size(1664, 48, 8192, 16),
}


def named(name: str, **fields) -> "ViT":
    """A ViT by its usual name: `named("S/16", num_classes=1000)`; other fields as given."""
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdecimal():
        raise ValueError(
            f"{name!r} is no ViT; write SIZE/PATCH with a size of {', '.join(SIZES)}"
        )
    return ViT(**{**dataclasses.asdict(SIZES[size]), "patch": int(patch), **fields})


class Encoder(nn.Module):
    """Images to logits `[B, V]`, by parts: every vision transformer here is one of these.

    `embed` makes tokens, `stack` and `norm` encode them, `pool` makes one vector of each
    row, `neck` is done to that vector. With `num_classes=0` the vector is the result.
    What it is called with, `embed` is.
    """

    embed: nn.Module  # (images) -> layers.embed.Tokens
    stack: nn.Module
    norm: nn.Module | None
    pool: nn.Module
    neck: nn.Module | None = None
    num_classes: int = 0
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self):
        zeros, sizes = nn.initializers.zeros, {"V": self.num_classes}
        self.head = Einsum("BD,DV->BV", sizes, True, self.dtype, zeros)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, *inputs, train: bool = False) -> Float[Array, "B V"]:
        x = self.features(*inputs, train=train)
        return self.head(x).astype(jnp.float32) if self.num_classes else x

    def features(self, *inputs, train: bool = False) -> Float[Array, "B D"]:
        """The pooled vector of each row, before the head."""
        x, pool = self._encode(*inputs, train=train)
        x = self.pool(x, **pool)
        return x if self.neck is None else self.neck(x)

    def encode(self, *inputs, train: bool = False) -> Float[Array, "B T D"]:
        """All tokens after the last norm, in the order of `embed`."""
        return self._encode(*inputs, train=train)[0]

    def _encode(self, *inputs, train: bool):
        x, block, pool = self.embed(*inputs, train=train)
        x = self.drop(x, deterministic=not train)
        x = self.stack(x, train=train, **block)
        return (x if self.norm is None else self.norm(x)), pool


class TwoHeads(Encoder):
    """DeiT with its teacher's head: the mean of what the first two tokens say.

    Source: Touvron et al. 2021, arXiv 2012.12877.
    """

    def setup(self):
        super().setup()
        zeros, sizes = nn.initializers.zeros, {"V": self.num_classes}
        self.second_head = Einsum("BD,DV->BV", sizes, True, self.dtype, zeros)

    def __call__(self, *inputs, train: bool = False) -> Float[Array, "B V"]:
        x = self.encode(*inputs, train=train)
        return ((self.head(x[:, 0]) + self.second_head(x[:, 1])) / 2).astype(jnp.float32)


class Numbers(nn.Module):
    """An encoder by its numbers: `parts()` makes the `Encoder` that it is."""

    def setup(self):
        self.encoder = self.parts()
        nn.share_scope(self, self.encoder)  # Its parameters are this module's.

    def __call__(self, *inputs, train: bool = False) -> Float[Array, "B V"]:
        return self.encoder(*inputs, train=train)

    def features(self, *inputs, train: bool = False) -> Float[Array, "B D"]:
        """The pooled vector of each row, before the head."""
        return self.encoder.features(*inputs, train=train)

    def encode(self, *inputs, train: bool = False) -> Float[Array, "B T D"]:
        """All tokens after the last norm, in the order of the embedding."""
        return self.encoder.encode(*inputs, train=train)

    def parts(self) -> Encoder:
        """The parts that these numbers stand for."""
        raise NotImplementedError(type(self).__name__)


class ViT(Numbers):
    """Vision transformer by its numbers; `parts()` is the same as an `Encoder`.

    `model.apply({"params": params}, images)` gives logits `[B, V]`; with `num_classes=0`
    it gives the pooled features `[B, D]`. Images have values around 0, `[B, Y, X, C]`.
    Learned positions are of images of `size` pixels, (rows, columns), and resized for
    others; without `size` they are of the images that come, which then never change.

    The class token of `pool` "cls" has a position too, as in the first ViT; that of "tok"
    has none, as in big_vision, whose `activation` is `gelu_tanh`. With `rep_size` a tanh
    layer of that width follows the pooling.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch: int
    num_classes: int = 1000
    size: tuple[int, int] | None = None
    channels: int | None = None  # of the images; None: of those that come.
    positions: Literal["learned", "sincos", "rotary"] = "learned"
    pool: Literal["cls", "tok", "gap", "map"] = "cls"
    registers: int = 0
    qk_norm: bool = False
    layer_scale: float | None = None
    activation: Callable[[Array], Array] = gelu
    rep_size: int = 0
    dropout: float = 0.0
    drop_path: float = 0.0
    remat: Remat = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def parts(self) -> Encoder:
        """The parts that these numbers stand for.

        Raises:
          ValueError: heads that do not divide the width; an unknown pool or positions.
        """
        D, dtype = self.width, self.dtype
        if D % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide width={D}")
        prefix = int(self.pool in ("cls", "tok"))
        grid = None
        if self.size is not None:
            grid = (self.size[0] // self.patch, self.size[1] // self.patch)
        position = rotary = None
        if self.positions == "learned":
            position = GridPosition(D, grid, int(self.pool == "cls"), parent=None)
        elif self.positions == "sincos":
            position = SincosPosition(D, parent=None)
        elif self.positions == "rotary":
            rotary = GridAngles(D // self.num_heads, parent=None)
        else:
            raise ValueError(
                f"positions={self.positions!r} must be one of learned, sincos, rotary"
            )
        if prefix:
            pool = First(parent=None)
        elif self.pool == "gap":
            pool = Average(self.registers, parent=None)
        elif self.pool == "map":
            pool = AttentionPool(self._attention(), self._mlp(), parent=None)
        else:
            raise ValueError(f"pool={self.pool!r} must be one of cls, tok, gap, map")
        neck = None
        if self.rep_size:
            neck = TanhLayer(self.rep_size, dtype=dtype, parent=None)
        block = Block(
            self._attention(),
            self._mlp(),
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            parent=None,
        )
        return Encoder(
            PatchEmbed(
                self.patch,
                D,
                position,
                rotary,
                prefix,
                self.registers,
                channels=self.channels,
                dtype=dtype,
                parent=None,
            ),
            Stack(block, self.depth, self.remat, self.unroll, self.drop_path, parent=None),
            LayerNorm(parent=None),
            pool,
            neck,
            num_classes=self.num_classes,
            dropout=self.dropout,
            dtype=dtype,
            parent=None,
        )

    def _attention(self) -> Attention:
        return Attention(
            self.num_heads,
            self.width // self.num_heads,
            qk_norm=RMSNorm if self.qk_norm else None,
            use_bias=True,
            dtype=self.dtype,
            parent=None,
        )

    def _mlp(self) -> Mlp:
        return Mlp(
            self.mlp_dim,
            self.activation,
            use_bias=True,
            dropout=self.dropout,
            dtype=self.dtype,
            parent=None,
        )


def attention_map(
    model: nn.Module, variables: Mapping[str, Any], *inputs, layer: int = -1
) -> Float[Array, "B N T S"]:
    """Where each token of an encoder looks in one of its layers: weights that sum to 1.

    `attention_map(model, {"params": params}, images)` is of the last layer. Tokens are in
    the order of the embedding: class token, registers, patches row by row. For an
    `Encoder` or `ViT` whose blocks are alike; those of all layers are made on the way.

    Raises:
      ValueError: there is no such layer, or the model has no stack of attention.
    """
    seen: Any = model.apply(variables, *inputs, method="encode", mutable=["maps"])[1]
    found = seen.get("maps", {}).get("stack", {}).get("block", {}).get("attention", {})
    if "weights" not in found:
        raise ValueError(f"{type(model).__name__} has no stack of blocks with attention")
    maps = found["weights"][0]
    if not -len(maps) <= layer < len(maps):
        raise ValueError(f"layer={layer} is not one of {len(maps)}; the last is -1")
    return maps[layer]


def flops(model: ViT, shape: tuple[int, int, int] = (224, 224, 3)) -> int:
    """Floating-point operations of one image forward: 2 for each multiply-add.

    Counts the products of matrices alone. A training step costs three times as much.
    """
    Y, X, C = shape
    D, F = model.width, model.mlp_dim
    patches = (Y // model.patch) * (X // model.patch)
    T = patches + model.registers + (model.pool in ("cls", "tok"))
    layer = 4 * T * D * D + 2 * T * T * D + 2 * T * D * F
    head = (model.rep_size or D) * model.num_classes + D * model.rep_size
    if model.pool == "map":
        head += 2 * D * D + 2 * T * D * D + 2 * T * D + 2 * D * F
    return 2 * (patches * model.patch**2 * C * D + model.depth * layer + head)
