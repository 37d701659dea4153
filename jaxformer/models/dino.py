"""DINOv2 and DINOv3: vision transformers that learned without labels.

Sources: Oquab et al. 2023 (arXiv 2304.07193), Darcet et al. 2024 (2309.16588) for registers,
Simeoni et al. 2025 (2508.10104) for DINOv3. They are `models.vit.Encoder` of other parts.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Stack
from jaxformer.layers.embed import CenteredAngles, GridPosition, MaskToken, PatchEmbed
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import First, FirstAndAverage
from jaxformer.models import vit
from jaxformer.models.vit import Encoder
from jaxformer.ops.activation import gelu, silu


@dataclasses.dataclass(frozen=True)
class Size(vit.Size):
    """What a named size fixes."""

    activation: Callable[[Array], Array] = gelu
    gated: bool = False
    qkv_bias: bool = True


_SWIGLU = {"activation": silu, "gated": True}

# With patches of 14 pixels.
DINOV2 = {
    "S": Size(384, 12, 1536, 6),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "g": Size(1536, 40, 4096, 24, **_SWIGLU),
}
# With patches of 16 pixels.
DINOV3 = {
    "S": Size(384, 12, 1536, 6),
    "S+": Size(384, 12, 1536, 6, **_SWIGLU),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "L+": Size(1024, 24, 4096, 16, **_SWIGLU),
    "H+": Size(1280, 32, 5120, 20, **_SWIGLU),
    "7B": Size(4096, 40, 8192, 32, **_SWIGLU, qkv_bias=False),
}


def dinov2(
    size: str | Size,
    *,
    patch: int = 14,
    grid: tuple[int, int] = (37, 37),
    registers: int = 0,
    num_classes: int = 0,
    mask_token: bool = True,
    channels: int = 3,
    layer_scale: float = 1e-5,
    epsilon: float = 1e-6,
    dtype: DTypeLike = jnp.float32,
) -> Encoder:
    """DINOv2, with registers or without: `dinov2("B", registers=4)`.

    `grid` is that of the learned positions, resized for other images: bicubic, antialiased
    where there are registers. Without classes it gives the class token `[B, D]`; with them
    a classifier reads that and the mean of the patches. It may be called with patches
    `masked` `[B, T]`, in the order of the patches.

    Raises:
      ValueError: a size that is none of `DINOV2`; heads that do not divide the width.
    """
    size = _size(size, DINOV2)
    position = GridPosition(size.width, grid, prefix=1, antialias=registers > 0)
    embed = PatchEmbed(
        patch,
        size.width,
        position,
        prefix=1,
        registers=registers,
        mask=MaskToken(size.width) if mask_token else None,
        channels=channels,
        dtype=dtype,
    )
    attention = _attention(size, dtype, key_bias=size.qkv_bias)
    pool = FirstAndAverage(1 + registers) if num_classes else First()
    return _encoder(embed, size, attention, pool, layer_scale, epsilon, num_classes, dtype)


def dinov3(
    size: str | Size,
    *,
    patch: int = 16,
    registers: int = 4,
    channels: int = 3,
    layer_scale: float = 1e-5,
    epsilon: float = 1e-5,
    dtype: DTypeLike = jnp.float32,
) -> Encoder:
    """DINOv3: `dinov3("L")`, whose only positions are rotary, for images of any size.

    It gives the class token `[B, D]`, and its `encode` all tokens: class token, registers,
    patches. It may be called with patches `masked` `[B, T]`.

    Raises:
      ValueError: a size that is none of `DINOV3`; heads that do not divide the width.
    """
    size = _size(size, DINOV3)
    embed = PatchEmbed(
        patch,
        size.width,
        rotary=CenteredAngles(size.width // size.num_heads, rescale=2.0),
        prefix=1,
        registers=registers,
        mask=MaskToken(size.width),
        channels=channels,
        dtype=dtype,
    )
    attention = _attention(size, dtype, key_bias=False)
    return _encoder(embed, size, attention, First(), layer_scale, epsilon, 0, dtype)


def _size(size: str | Size, sizes: dict[str, Size]) -> Size:
    if isinstance(size, str):
        if size not in sizes:
            raise ValueError(f"size={size!r} is not known; known are {', '.join(sizes)}")
        size = sizes[size]
    if size.width % size.num_heads:
        raise ValueError(f"num_heads={size.num_heads} must divide width={size.width}")
    return size


def _attention(size: Size, dtype: DTypeLike, *, key_bias: bool) -> Attention:
    return Attention(
        size.num_heads,
        size.width // size.num_heads,
        use_bias=size.qkv_bias,
        key_bias=key_bias,
        out_bias=True,
        dtype=dtype,
    )


def _encoder(
    embed: PatchEmbed,
    size: Size,
    attention: Attention,
    pool: nn.Module,
    layer_scale: float,
    epsilon: float,
    num_classes: int,
    dtype: DTypeLike,
) -> Encoder:
    mlp = Mlp(size.mlp_dim, size.activation, size.gated, use_bias=True, dtype=dtype)
    return Encoder(
        embed,
        Stack(Block(attention, mlp, epsilon=epsilon, layer_scale=layer_scale), size.depth),
        LayerNorm(epsilon),
        pool,
        num_classes=num_classes,
        dtype=dtype,
    )
