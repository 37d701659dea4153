"""Rows of token ids as vectors, and one vector of each row."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.embed import Embedding, Tokens
from jaxformer.ops.mask import Causal, Segments
from jaxformer.sharding import constrain


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
