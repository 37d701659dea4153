"""DiT that is told two things of a picture, such as a character and a font, by one label."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.layers.embed import Embedding
from jaxformer.layers.timestep import TimestepEmbed
from jaxformer.models.dit import Denoiser, DiT, Given
from jaxformer.ops.timestep import cosines_first


class PairCondition(nn.Module):
    """A time and the two parts of a label as the sum of their vectors.

    Of `first * second` labels, `label % first` is a row of one table and `label // first` of
    another, so that a pair that was never seen is known by its parts. Both tables have a last
    row for none: for a label of `first * second` or None, and in training for both parts of a
    label with the chance `dropout`. A label that is none of these makes NaN.
    """

    width: int
    first: int
    second: int
    dropout: float = 0.1
    features: Callable[..., Array] = cosines_first
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, t: Float[Array, " B"], label: Int[Array, " B"] | None, *, train: bool = False
    ) -> Given:
        D, none = self.width, self.first * self.second
        found = TimestepEmbed(D, features=self.features, dtype=self.dtype, name="time")(t)
        if label is None:
            label = jnp.full(t.shape, none)
        if train and self.dropout:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), self.dropout, t.shape)
            label = jnp.where(dropped, none, label)
        parts = (label % self.first, self.first), (label // self.first, self.second)
        for name, (part, count) in zip(("first", "second"), parts, strict=True):
            row = jnp.where(label == none, count, part)
            row = jnp.where((label < 0) | (label > none), count + 1, row)
            table = Embedding(D, "VD", name=name)(count + 1)
            vector = table.at[row].get(mode="fill", fill_value=jnp.nan)
            found += vector.astype(self.dtype)
        return Given(found[:, None])


class PairDiT(DiT):
    """A `DiT` whose `num_classes` labels are pairs: `second * firsts + first`."""

    firsts: int = 1

    def parts(self) -> Denoiser:
        """Its parts, whose condition knows pairs.

        Raises:
          ValueError: labels that are no whole pairs, or classes as tokens.
        """
        if self.num_classes % self.firsts or self.context:
            raise ValueError(
                f"firsts={self.firsts} must divide num_classes={self.num_classes}, and "
                f"context={self.context} be 0"
            )
        pairs = self.firsts, self.num_classes // self.firsts
        condition = PairCondition(
            self.width, *pairs, self.label_dropout, dtype=self.dtype, parent=None
        )
        return super().parts().clone(condition=condition)
