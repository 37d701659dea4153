"""DiT that is told two times, one and how far to look back from it: for mean flow."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.layers.timestep import TimestepEmbed
from jaxformer.models.dit import ClassCondition, Denoiser, DiT, Given


class SpanCondition(nn.Module):
    """What `classes` makes of a time and a class, and the vector of a span beside it.

    Times `[B, 2]` are times and spans; of times `[B]` the span is 0. Both are told as they
    are and not in thousandths: what is learned is a derivative by them, which features of
    thousandths make a thousand times as large. Source: Geng et al. 2025 (arXiv 2505.13447),
    whose best models embed both so.
    """

    classes: ClassCondition
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, t: Float[Array, "B ..."], label: Int[Array, " B"] | None, *, train: bool = False
    ) -> Given:
        both = t if t.ndim == 2 else jnp.stack([t, jnp.zeros_like(t)], 1)
        given = self.classes(both[:, 0], label, train=train)
        embed = TimestepEmbed(self.width, scale=1.0, dtype=self.dtype, name="span")
        return given._replace(condition=given.condition + embed(both[:, 1])[:, None])


class SpanDiT(DiT):
    """A `DiT` that takes `t` `[B, 2]`, times and spans, or `[B]` for spans of 0."""

    def parts(self) -> Denoiser:
        """Its parts, whose condition knows spans."""
        whole = super().parts()
        classes: Any = whole.condition
        classes = classes.clone(scale=1.0)
        condition = SpanCondition(classes, self.width, self.dtype, parent=None)
        return whole.clone(condition=condition)
