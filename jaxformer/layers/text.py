"""Rows of token ids as vectors, where they stand, and one vector of each row."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.embed import Embedding, Tokens
from jaxformer.ops.mask import Causal, Segments
from jaxformer.ops.rotary import angles
from jaxformer.sharding import constrain, partitioned


class TokenEmbed(nn.Module):
    """Token ids as vectors, with learned positions; how they see each other goes along.

    With `causal` a token sees those before it and itself, else all. `real`, where it is
    given, says which tokens are none of padding: nobody sees the others, which themselves
    see the real ones (as transformers' `attention_mask`; SigLIP reads its text off a token
    of padding). Real tokens stand side by side.

    Raises:
      ValueError: more tokens than `length`.
    """

    vocab: int
    width: int
    length: int
    causal: bool = False
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        real: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> Tokens:
        T = tokens.shape[1]
        if self.length < T:
            raise ValueError(f"texts have {T} tokens; the model has length={self.length}")
        table = Embedding(self.width, "VD", name="token")(self.vocab)
        position = Embedding(self.width, name="position")(self.length)
        x = (table[tokens] + position[None, :T]).astype(self.dtype)
        mask = Causal() if self.causal else None
        if real is not None:
            keys = Segments(jnp.ones_like(tokens), real.astype(tokens.dtype))
            mask = keys if mask is None else mask & keys
        return Tokens(constrain(x, "BTD"), {"mask": mask}, {"tokens": tokens})


class TokenTable(nn.Module):
    """A vector for each token id; the same table makes logits of vectors, where it is tied.

    Vectors are multiplied by `scale` on their way in (Gemma: the root of the width).
    """

    vocab: int
    width: int
    scale: float = 1.0
    dtype: DTypeLike = jnp.bfloat16

    def setup(self):
        init = partitioned(nn.initializers.normal(0.02), "VD")
        self.embedding = self.param("embedding", init, (self.vocab, self.width))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = self.embedding[tokens].astype(self.dtype)
        return x if self.scale == 1 else x * jnp.asarray(self.scale, self.dtype)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Products with every row of the table, summed in float32."""
        table = self.embedding.astype(self.dtype)
        return jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)


class LearnedPositions(nn.Module):
    """A learned vector for each of `length` positions. Source: GPT-2."""

    length: int
    width: int

    @nn.compact
    def __call__(self, positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = Embedding(self.width, name="position")(self.length)
        return table[jnp.maximum(positions, 0)]


class Sinusoids(nn.Module):
    """Sines and cosines in turn, of wave lengths from 2 pi to 10,000 times that.

    Source: Vaswani et al. 2017, arXiv 1706.03762.
    """

    width: int

    def __call__(self, positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        turns = angles(positions, self.width)
        pairs = jnp.stack([jnp.sin(turns), jnp.cos(turns)], -1)
        return pairs.reshape(*positions.shape, self.width)


class AtEnd(nn.Module):
    """The token where the text ends: the first with id `end`, or else the first of all.

    Without `end` it is the one of the greatest id, as in the first CLIP, whose end token
    is the last of its vocabulary.
    """

    end: int | None = None

    def __call__(
        self, x: Float[Array, "B T D"], tokens: Int[Array, "B T"]
    ) -> Float[Array, "B D"]:
        found = (tokens if self.end is None else tokens == self.end).argmax(1)
        return jnp.take_along_axis(x, found[:, None, None], 1)[:, 0]


class Last(nn.Module):
    """The last token, be it of padding, as SigLIP's texts have it."""

    def __call__(
        self, x: Float[Array, "B T D"], tokens: Int[Array, "B T"]
    ) -> Float[Array, "B D"]:
        return x[:, -1]
