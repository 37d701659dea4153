"""Vision transformer: images to class logits, or to the tokens under them.

Sources: Dosovitskiy et al. 2021 (arXiv 2010.11929), Zhai et al. 2022 (2106.04560) for the
larger sizes and MAP, Darcet et al. 2024 (2309.16588) for registers, Beyer et al. 2022
(2205.01580) for sin-cos positions with average pooling.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Remat, Stack
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import Embedding, PatchEmbed
from jaxformer.layers.norm import LayerNorm, RMSNorm
from jaxformer.layers.pool import AttentionPool
from jaxformer.ops.patches import grid, sincos_2d
from jaxformer.ops.rotary import angles_2d
from jaxformer.sharding import constrain


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


class ViT(nn.Module):
    """Vision transformer.

    `model.apply({"params": params}, images)` gives logits `[B, V]`; with `num_classes=0`
    it gives the pooled features `[B, D]`. Images have values around 0, `[B, Y, X, C]`.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch: int
    num_classes: int = 1000
    positions: Literal["learned", "sincos", "rotary"] = "learned"
    pool: Literal["cls", "gap", "map"] = "cls"
    registers: int = 0
    qk_norm: bool = False
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    remat: Remat = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def setup(self):
        D, dtype = self.width, self.dtype
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide width={self.width}")
        if self.pool not in ("cls", "gap", "map"):
            raise ValueError(f"pool={self.pool!r} must be one of cls, gap, map")
        if self.positions not in ("learned", "sincos", "rotary"):
            raise ValueError(
                f"positions={self.positions!r} must be one of learned, sincos, rotary"
            )
        self.embed = PatchEmbed(self.patch, D, dtype)
        self.position = Embedding(D)
        self.cls = Embedding(D)
        self.register_tokens = Embedding(D, name="registers")
        block = Block(
            self._attention(),
            self._mlp(),
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            parent=None,
        )
        self.stack = Stack(block, self.depth, self.remat, self.unroll, self.drop_path)
        self.norm = LayerNorm()
        self.attention_pool = AttentionPool(self._attention(), self._mlp(), name="pool")
        zeros, sizes = nn.initializers.zeros, {"V": self.num_classes}
        self.head = Einsum("BD,DV->BV", sizes, True, dtype, zeros)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B V"]:
        x = self.encode(images, train=train)
        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "gap":
            x = x[:, self.registers :].mean(1)
        else:
            x = self.attention_pool(x)
        return self.head(x).astype(jnp.float32) if self.num_classes else x

    def encode(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B T D"]:
        """All tokens after the last norm: class token (pool cls), registers, patches."""
        _, Y, X, _ = images.shape
        y, x_ = Y // self.patch, X // self.patch
        first = int(self.pool == "cls")
        x = self.embed(images)
        if first:
            x = _prepend(self.cls(1), x)
        angles = None
        if self.positions == "learned":
            x += self.position(x.shape[1]).astype(x.dtype)[None]
        elif self.positions == "sincos":
            position = jnp.asarray(sincos_2d(y, x_, self.width), x.dtype)
            x += jnp.pad(position, ((first, 0), (0, 0)))[None]
        else:
            angles = angles_2d(*grid(y, x_), self.width // self.num_heads)
            prefix = self.registers + first  # Not rotated: an angle of 0.
            angles = jnp.pad(angles, ((prefix, 0), (0, 0)))[None]
        if self.registers:
            registers = _prepend(self.register_tokens(self.registers), x[:, first:])
            x = jnp.concatenate([x[:, :first], registers], axis=1)
        x = self.drop(constrain(x, "BTD"), deterministic=not train)
        return self.norm(self.stack(x, train=train, angles=angles))

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
            use_bias=True,
            dropout=self.dropout,
            dtype=self.dtype,
            parent=None,
        )


def _prepend(tokens: Array, x: Array) -> Array:
    """Puts the same tokens, `T D`, before the rows of every example."""
    tokens = jnp.broadcast_to(tokens.astype(x.dtype), (x.shape[0], *tokens.shape))
    return jnp.concatenate([tokens, x], axis=1)


def flops(model: ViT, shape: tuple[int, int, int] = (224, 224, 3)) -> int:
    """Floating-point operations of one image forward: 2 for each multiply-add.

    Counts the products of matrices alone. A training step costs three times as much.
    """
    Y, X, C = shape
    D, F = model.width, model.mlp_dim
    patches = (Y // model.patch) * (X // model.patch)
    T = patches + model.registers + (model.pool == "cls")
    layer = 4 * T * D * D + 2 * T * T * D + 2 * T * D * F
    head = D * model.num_classes
    if model.pool == "map":
        head += 2 * D * D + 2 * T * D * D + 2 * T * D + 2 * D * F
    return 2 * (patches * model.patch**2 * C * D + model.depth * layer + head)
