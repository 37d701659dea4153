"""The Q-Former: learned queries that read an image for a language model, and a text beside.

Source: Li et al. 2023 (BLIP-2, arXiv 2301.12597), whose second stage is a `vlm.VLM` with a
`QFormer` as its connector; `FirstStage` is what is trained before, by
`objectives.image_text`. The layers are BERT's.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Chain, Mlp, Remat, Stack
from jaxformer.layers.embed import Embedding
from jaxformer.layers.norm import LayerNorm
from jaxformer.models.clip import Logits, unit
from jaxformer.ops.activation import gelu
from jaxformer.ops.mask import Causal, Mask, Prefix, Segments
from jaxformer.sharding import constrain


class QueryBlock(Block):
    """Queries, and a text after them, that see each other; queries see an image by `cross`.

    Post-norm, as BERT's. Text has an MLP of its own, `text_mlp`, and does not look at the
    image. Without `cross` the image is not looked at; without `text_mlp` there is no text.
    """

    cross: nn.Module | None = None
    text_mlp: nn.Module | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        queries: int,
        context: Float[Array, "B S C"] | None = None,
        train: bool = False,
        drop_path_rate=None,
        **inputs,
    ) -> Float[Array, "B T D"]:
        def add(x: Array, y: Array, name: str) -> Array:
            y = self.branch(y, name, train=train, drop_path_rate=drop_path_rate)
            return self.normed(x + y, f"{name}_norm")

        x = constrain(x, "BTD")
        x = add(x, self.attention(x, **inputs), "attention")
        seeing, text = x[:, :queries], x[:, queries:]
        found = []
        if queries:
            if self.cross is not None:
                seeing = add(seeing, self.cross(seeing, context), "cross")
            found.append(add(seeing, self.mlp(seeing, train=train), "mlp"))
        if text.shape[1]:
            if self.text_mlp is None:
                raise ValueError("QueryBlock has no text_mlp; give it one, or give no text")
            found.append(add(text, self.text_mlp(text, train=train), "text_mlp"))
        return constrain(jnp.concatenate(found, 1), "BTD")


class QFormer(nn.Module):
    """`count` learned queries of `width` that gather what an image's tokens say.

    A connector as those of `layers.connect`: `[B, t, C]` to `[B, count, D]`, where `out`
    takes the queries to the width of a language model. `stack` is of `QueryBlock`s. With
    `text`, such as `layers.text.TokenEmbed`, it reads texts too, see `read`.
    """

    count: int
    width: int
    stack: nn.Module
    out: nn.Module | None = None
    text: nn.Module | None = None
    epsilon: float = 1e-12  # of the norm before the layers.
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.queries = Embedding(self.width)
        self.norm = LayerNorm(self.epsilon)

    def __call__(
        self, x: Float[Array, "B t C"], *, train: bool = False
    ) -> Float[Array, "B s D"]:
        y = self.read(x, train=train)
        return y if self.out is None else self.out(y)

    def read(
        self,
        context: Float[Array, "B t C"] | None,
        tokens: Int[Array, "B T"] | None = None,
        mask: Mask | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B S D"]:
        """Queries that have seen an image, then a text; of both, what is there.

        Args:
          context: tokens of an image; without them there are no queries.
          tokens: a text.
          mask: who of the queries and the text, in this order, sees whom; all if not given.
          train: draws for dropout, by the random stream "dropout".
        """
        found, queries = [], 0
        if context is not None:
            table, queries = self.queries(self.count), self.count
            found.append(jnp.broadcast_to(table, (len(context), *table.shape)))
        if tokens is not None:
            if self.text is None:
                raise ValueError("this QFormer reads no text; give it text=TokenEmbed(...)")
            found.append(self.text(tokens).x)
        x = jnp.concatenate([x.astype(self.dtype) for x in found], 1)
        x = self.norm(x).astype(self.dtype)
        return self.stack(x, queries=queries, context=context, mask=mask, train=train)


class FirstStage(nn.Module):
    """An image and a text by one `QFormer`, in the three ways in which it is first trained.

    `model.apply({"params": params}, images, tokens)` gives cosines `[b, B]`, the greatest
    over the queries of an image, and logits `[B, 2]` of whether row i's image and text
    belong together: not, and yes. `real` says which tokens are none of padding. Tokens
    start with one that stands for the text (BERT's `[CLS]`); where a text is written, and
    not read, `begin` stands there. `vision` is an encoder with a method `encode`, of whose
    tokens the first `skip` are left out.
    """

    vision: Any
    former: QFormer
    image: nn.Module  # [B, Q, D] -> [B, Q, E]
    text: nn.Module  # [B, D] -> [B, E]
    match: nn.Module  # [B, Q, D] -> [B, Q, 2]
    head: nn.Module | None = None  # [B, T, D] -> [B, T, V]; None: texts are not written.
    begin: int = 0
    skip: int = 0
    scale: float = math.log(1 / 0.07)

    def setup(self):
        self.logits = Logits(self.scale)

    def __call__(
        self,
        images: Float[Array, "B ..."],
        tokens: Int[Array, "B T"],
        real: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "b B"], Float[Array, "B 2"]]:
        context, image, text, *_ = self.encode(images, tokens, real, train=train)
        cosines = jnp.einsum("bqe,Be->bBq", image, text).max(-1)
        return cosines, self.matches(context, tokens, real, train=train)

    def encode(
        self,
        images: Float[Array, "B ..."],
        tokens: Int[Array, "B T"],
        real: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Array, Array, Array, Array, Array | None]:
        """What images and texts are, each without the other, and the texts as written.

        Returns:
          the images' tokens `[B, t, C]`; vectors of length 1 of images, one a query, `[B,
          Q, E]`, and of texts, `[B, E]`; the scale of their cosines; logits `[B, T, V]` of
          the token after each, by the image and the tokens before, None without a `head`.

        The queries do not see the text that is written after them, so that one pass serves
        their vectors and the text's logits.
        """
        context = self.vision.encode(images, train=train)[:, self.skip :]
        former, count = self.former, self.former.count
        if self.head is None:
            seen, written = former.read(context, train=train), None
        else:
            started = tokens.at[:, 0].set(self.begin)
            mask = Causal() | Prefix(count)
            both = former.read(context, started, mask, train=train)
            seen, written = both[:, :count], both[:, count:]
            written = self.head(written).astype(jnp.float32)
        read = former.read(None, tokens, _real(tokens, real), train=train)
        image = self.image(seen).astype(jnp.float32)
        B, Q, E = image.shape
        image = unit(image.reshape(B * Q, E)).reshape(B, Q, E)
        text = unit(self.text(read[:, 0]).astype(jnp.float32))
        return context, image, text, self.logits()[0], written

    def matches(
        self,
        context: Float[Array, "B t C"],
        tokens: Int[Array, "B T"],
        real: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B 2"]:
        """Logits of whether row i's image, by its tokens, and text belong together."""
        mask = _real(tokens, real, self.former.count)
        seen = self.former.read(context, tokens, mask, train=train)[:, : self.former.count]
        return self.match(seen).astype(jnp.float32).mean(1)


def _real(tokens: Array, real: Array | None, before: int = 0) -> Mask | None:
    """All see all but padding, where `before` others stand before the tokens."""
    if real is None:
        return None
    keys = jnp.pad(real.astype(jnp.int32), ((0, 0), (before, 0)), constant_values=1)
    return Segments(jnp.ones_like(keys), keys)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A `QFormer`'s layers by their numbers; as they are, those of BLIP-2.

    `stack()` has cross-attention in every `every`-th layer, from the first; with `reads`
    the layers have an MLP for text.
    """

    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12
    every: int = 2
    reads: bool = False
    epsilon: float = 1e-12
    dropout: float = 0.0
    remat: Remat = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def stack(self) -> Stack:
        """The layers.

        Raises:
          ValueError: heads that do not divide the width, or `every` that does not the depth.
        """
        if self.width % self.num_heads or self.depth % self.every:
            raise ValueError(
                f"num_heads={self.num_heads} must divide width={self.width}, and "
                f"every={self.every} depth={self.depth}"
            )
        blocks = tuple(self.block(i == 0) for i in range(self.every))
        block = blocks[0] if len(blocks) == 1 else Chain(blocks)
        unroll = max(1, self.unroll // self.every)
        return Stack(block, self.depth // self.every, self.remat, unroll)

    def block(self, sees: bool) -> QueryBlock:
        """One layer, which looks at the image or does not."""
        return QueryBlock(
            self._attention(),
            self._mlp(),
            LayerNorm,
            self.epsilon,
            dropout=self.dropout,
            cross=self._attention() if sees else None,
            text_mlp=self._mlp() if self.reads else None,
        )

    def _attention(self) -> Attention:
        N, H = self.num_heads, self.width // self.num_heads
        return Attention(N, H, use_bias=True, dtype=self.dtype)

    def _mlp(self) -> Mlp:
        return Mlp(self.mlp_dim, gelu, use_bias=True, dtype=self.dtype)


def flops(sizes: Sizes, count: int, seen: int, width: int) -> int:
    """Floating-point operations of `count` queries that look at `seen` tokens of `width`."""
    D, F = sizes.width, sizes.mlp_dim
    layer = count * (4 * D * D + 2 * D * F) + 2 * count * count * D
    cross = 2 * count * D * D + 2 * seen * width * D + 2 * count * seen * D
    return 2 * (sizes.depth * layer + sizes.depth // sizes.every * cross)
