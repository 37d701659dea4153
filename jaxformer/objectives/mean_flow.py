"""Mean flow: a model learns the mean of the velocity over a span of time, to draw in few steps.

Geng et al. 2025 (arXiv 2505.13447). The mean velocity `u` from `t` back to `t - span` moves a
point there in one step. By its definition `u = v - span du/dt`, with `t - span` held, and that
is what is learned: one product of the Jacobian with a vector, forward, gives `du/dt`. Over a
span of 0 it is flow matching.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.metrics import Mean, Metrics
from jaxformer.objectives.condition import Classes
from jaxformer.objectives.paths import Linear, Reading, over
from jaxformer.objectives.times import Law, LogitNormal, times

Rows = Float[Array, "B ..."]
Says = Callable[[Rows, Float[Array, "B 2"]], Rows]
LAW = LogitNormal(-0.4, 1.0)
PATH = Linear()


def spans(key: Array, rows: int, law: Law, apart: float) -> Float[Array, "B 2"]:
    """Times and spans back from them; of a share `apart` of the rows the span is not 0.

    Two times of the law are drawn a row, and the later is the one that is looked back from.
    """
    first, second, which = jax.random.split(key, 3)
    pair = jnp.stack([law.quantile(times(k, rows)) for k in (first, second)])
    late, early = pair.max(0), pair.min(0)
    some = times(which, rows) < apart
    alone = pair[0]
    return jnp.stack([jnp.where(some, late, alone), jnp.where(some, late - early, 0)], 1)


def target(says: Says, at: Rows, v: Rows, t: Float[Array, "B 2"]) -> tuple[Rows, Rows]:
    """What a model says at a point, and what it should say there; no gradient in the latter.

    Args:
      says: `(x, (t, span)) -> ` the mean velocity.
      at: points.
      v: the velocity there.
      t: times and spans.
    """
    said, rate = jax.jvp(says, (at, t), (v, jnp.ones_like(t)))
    wanted = v - over(t[:, 1], at) * rate.astype(at.dtype)
    return said, jax.lax.stop_gradient(wanted)


@dataclasses.dataclass(frozen=True)
class MeanFlow:
    """Mean flow of `batch["image"]`, given `batch["label"]` where there are classes.

    The model is called `(x, t, label)` with `t` `[B, 2]`, times and spans, as a
    `models.span_dit.SpanDiT`; with `t` `[B]` the span is 0 and it is any other flow, which
    the other samplers follow. The error of a row weighs `1 / (error + 1e-3) ** power`.
    """

    classes: Classes | None = None
    law: Law = LAW
    apart: float = 0.25
    power: float = 1.0

    @property
    def inputs(self) -> tuple[str, ...]:
        """The entries of a batch that it reads."""
        return ("image",) if self.classes is None else ("image", "label")

    @property
    def reading(self) -> Reading:
        """What the model says over a span of 0."""
        return Reading("velocity", PATH)

    def arguments(self, image: Array, *label: Array) -> tuple[Array, ...]:
        """What the model is called with, of such a batch."""
        return (image, jnp.zeros((image.shape[0], 2)), *label)

    def check(self, model: Any, pipeline: Any) -> None:
        """Raises InputError where model, data and objective do not fit."""
        if self.classes is not None:
            self.classes.check(model, pipeline)

    def errors(self, says: Says, x: Rows, key: Array) -> Float[Array, " B"]:
        """The squared error of each row, a mean over its numbers; float32."""
        when, which = jax.random.split(key)
        t = spans(when, x.shape[0], self.law, self.apart)
        x = x.astype(jnp.float32)
        noise = jax.random.normal(which, x.shape)
        late = over(t[:, 0], x)
        said, wanted = target(says, (1 - late) * x + late * noise, noise - x, t)
        return ((said - wanted) ** 2).reshape(len(x), -1).mean(-1)

    def loss(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The weighed error, and the `error` itself beside it; args as of `Flow.loss`."""
        key, more = jax.random.split(key)
        image, *label = (batch[name] for name in self.inputs)

        def says(x, t):
            options = {"train": True, "rngs": {"dropout": more}}
            said = apply({"params": params}, x, t, *label, **options)
            return said[..., : x.shape[-1]].astype(jnp.float32)

        each = self.errors(says, image, key)
        weight = jax.lax.stop_gradient((each + 1e-3) ** -self.power)
        real = batch.get("weight", jnp.ones(len(image))) > 0
        total = jnp.maximum(real.sum(), 1)
        value = jnp.where(real, each * weight, 0).sum() / total
        return value, {"error": jnp.where(real, each, 0).sum() / total}

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> Metrics:
        """The error, with all labels given; times and noise are those of the key."""
        image, *label = (batch[name] for name in self.inputs)

        def says(x, t):
            return apply({"params": params}, x, t, *label)[..., : x.shape[-1]]

        each = self.errors(says, image, key)
        real = batch.get("weight", jnp.ones(len(image))) > 0
        return {"loss": Mean(jnp.where(real, each, 0).sum(), real.sum(dtype=jnp.int32))}
