"""CLIP: one tower for images, one for texts, and the cosines of what they give.

Sources: Radford et al. 2021 (arXiv 2103.00020), and the code of its release for the sizes.
`jaxformer.models.siglip` has SigLIP, of the same two towers with other parts.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Remat, Stack
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import GridPosition, PatchEmbed
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import First
from jaxformer.layers.text import AtEnd, TokenEmbed
from jaxformer.models.vit import SIZES as VIT
from jaxformer.models.vit import Encoder, Size
from jaxformer.ops.activation import quick_gelu
from jaxformer.sharding import partitioned


class Logits(nn.Module):
    """What cosines become logits with: the learned scale, exp taken, and the bias.

    `scale` and `bias` are what they start from, the scale's before exp; without a bias it
    is 0 and not learned.
    """

    scale: float
    bias: float | None = None

    @nn.compact
    def __call__(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        def learned(name: str, value: float) -> Array:
            return self.param(name, partitioned(nn.initializers.constant(value), ""), ())

        scale = jnp.exp(learned("scale", self.scale))
        bias = learned("bias", self.bias) if self.bias is not None else jnp.zeros(())
        return scale, bias


class TwoTowers(nn.Module):
    """Images and texts to `[b, B]` logits, by parts.

    `model.apply({"params": params}, images, tokens)`; a tower of images that takes more
    than one array takes them in the place of `images`: `(patches, grids, tokens)`.
    `scale` and `bias` are what `Logits` starts from.
    """

    vision: nn.Module  # (images) -> [b, E], such as a vit.Encoder without classes.
    text: nn.Module  # (tokens) -> [B, E].
    scale: float
    bias: float | None = None

    def setup(self):
        self.logits = Logits(self.scale, self.bias)

    def __call__(self, *inputs: Array, train: bool = False) -> Float[Array, "b B"]:
        image, text, scale, bias = self.encode(*inputs, train=train)
        cosines = jnp.einsum("be,Be->bB", image, text, precision=jax.lax.Precision.HIGHEST)
        return scale * cosines + bias

    def encode(
        self, *inputs: Array, train: bool = False
    ) -> tuple[Float[Array, "b E"], Float[Array, "B E"], Float[Array, ""], Float[Array, ""]]:
        """Embeddings of images and of texts, of length 1; the scale, exp taken; the bias."""
        *images, tokens = inputs
        image = self.encode_image(*images, train=train)
        text = self.encode_text(tokens, train=train)
        return unit(image), unit(text), *self.logits()

    def encode_image(self, *images: Array, train: bool = False) -> Float[Array, "b E"]:
        """Embeddings of images, float32, of any length: `unit` makes it 1."""
        return self.vision(*images, train=train).astype(jnp.float32)

    def encode_text(
        self,
        tokens: Int[Array, "B T"],
        real: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B E"]:
        """Embeddings of texts, float32, of any length; see `TokenEmbed` for `real`."""
        return self.text(tokens, real, train=train).astype(jnp.float32)


def unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Rows divided by their length; rows of 0 stay, and have a gradient."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-20))


class Numbers(nn.Module):
    """What models of two towers have in common that are told by numbers alone.

    `parts()` is the same as `TwoTowers`; images are of `size` pixels, (rows, columns), or
    any that `patch` divides, and texts have up to `length` tokens.
    """

    vision: Size
    text: Size
    patch: int
    size: tuple[int, int]
    vocab: int
    length: int
    channels: int = 3
    dropout: float = 0.0
    drop_path: float = 0.0
    remat: Remat = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.towers = self.parts()
        nn.share_scope(self, self.towers)  # Its parameters are this module's.

    def __call__(self, *inputs: Array, train: bool = False) -> Float[Array, "b B"]:
        return self.towers(*inputs, train=train)

    def encode(self, *inputs: Array, train: bool = False):
        """Embeddings of length 1, scale and bias: see `TwoTowers.encode`."""
        return self.towers.encode(*inputs, train=train)

    def encode_image(self, *images: Array, train: bool = False) -> Float[Array, "b E"]:
        """Embeddings of images, float32, of any length."""
        return self.towers.encode_image(*images, train=train)

    def encode_text(
        self,
        tokens: Int[Array, "B T"],
        real: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B E"]:
        """Embeddings of texts, float32, of any length; see `TokenEmbed` for `real`."""
        return self.towers.encode_text(tokens, real, train=train)

    def parts(self) -> TwoTowers:
        """The parts that these numbers stand for."""
        raise NotImplementedError(type(self).__name__)

    def _grid(self) -> tuple[int, int]:
        rows, columns = self.size
        if rows % self.patch or columns % self.patch:
            raise ValueError(f"patch={self.patch} must divide size={self.size}")
        return rows // self.patch, columns // self.patch

    def _attention(self, size: Size) -> Attention:
        if size.width % size.num_heads:
            raise ValueError(f"num_heads={size.num_heads} must divide width={size.width}")
        head_dim = size.width // size.num_heads
        return Attention(size.num_heads, head_dim, use_bias=True, dtype=self.dtype, parent=None)

    def _mlp(self, size: Size, activation) -> Mlp:
        return Mlp(
            size.mlp_dim,
            activation,
            use_bias=True,
            dropout=self.dropout,
            dtype=self.dtype,
            parent=None,
        )

    def _stack(self, size: Size, activation, epsilon: float) -> Stack:
        block = Block(
            self._attention(size),
            self._mlp(size, activation),
            epsilon=epsilon,
            dropout=self.dropout,
            parent=None,
        )
        return Stack(block, size.depth, self.remat, self.unroll, self.drop_path, parent=None)

    def _encoder(self, *parts: Any) -> Encoder:
        return Encoder(*parts, dropout=self.dropout, dtype=self.dtype, parent=None)


class CLIP(Numbers):
    """CLIP by its numbers: a class token, causal texts read off their `end` token.

    `embed` is the width that both towers are projected to. `end` as in `AtEnd`.

    Example:
      >>> named("B/32").embed
      512
    """

    embed: int = 512
    end: int | None = None

    def parts(self) -> TwoTowers:
        """The parts that these numbers stand for.

        Raises:
          ValueError: heads that do not divide the width; a patch that does not divide the
            size.
        """
        D, dtype, epsilon = self.vision.width, self.dtype, 1e-5
        vision = self._encoder(
            PatchEmbed(
                self.patch,
                D,
                GridPosition(D, shape=self._grid(), prefix=1, parent=None),
                prefix=1,
                use_bias=False,
                norm=LayerNorm(epsilon, parent=None),
                channels=self.channels,
                dtype=dtype,
                parent=None,
            ),
            self._stack(self.vision, quick_gelu, epsilon),
            LayerNorm(epsilon, parent=None),
            First(parent=None),
            self._projection(),
        )
        W = self.text.width
        text = self._encoder(
            TokenEmbed(self.vocab, W, self.length, causal=True, dtype=dtype, parent=None),
            self._stack(self.text, quick_gelu, epsilon),
            LayerNorm(epsilon, parent=None),
            AtEnd(self.end, parent=None),
            self._projection(),
        )
        return TwoTowers(vision, text, math.log(1 / 0.07), parent=None)

    def _projection(self) -> Einsum:
        return Einsum("BD,DP->BP", {"P": self.embed}, dtype=self.dtype, parent=None)


# The models that OpenAI released: towers, patch, pixels, width of the embedding.
SIZES = {
    "B/32": (VIT["B"], Size(512, 12, 2048, 8), 32, 224, 512),
    "B/16": (VIT["B"], Size(512, 12, 2048, 8), 16, 224, 512),
    "L/14": (VIT["L"], Size(768, 12, 3072, 12), 14, 224, 768),
    "L/14@336": (VIT["L"], Size(768, 12, 3072, 12), 14, 336, 768),
}


def named(name: str, **fields) -> CLIP:
    """A CLIP by its usual name, such as `named("L/14@336")`; other fields as given."""
    if name not in SIZES:
        raise ValueError(f"{name!r} is no CLIP; known are {', '.join(SIZES)}")
    vision, text, patch, side, embed = SIZES[name]
    made = CLIP(vision, text, patch, (side, side), vocab=49_408, length=77, embed=embed)
    return dataclasses.replace(made, **fields)


def flops(
    model: Numbers, image: tuple[int, ...] = (224, 224, 3), text: tuple[int, ...] = (77,)
) -> int:
    """Floating-point operations of one pair forward, as `models.vit.flops` counts them.

    Of a tower's ends only the patches are counted: pooling and projections are of one token.
    """
    Y, X, C = image
    patches = (Y // model.patch) * (X // model.patch)

    def tower(size: Size, T: int) -> int:
        D, F = size.width, size.mlp_dim
        return size.depth * (4 * T * D * D + 2 * T * T * D + 2 * T * D * F)

    embed = patches * model.patch**2 * C * model.vision.width
    return 2 * (embed + tower(model.vision, patches) + tower(model.text, text[0]))
