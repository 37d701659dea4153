"""Flow matching: a model learns the velocity of the paths from data to noise.

Rectified flow (Liu et al. 2022, arXiv 2209.03003), the interpolants of SiT (Ma et al. 2024,
2401.08740), and JiT's prediction of data under the same loss (2511.13720). What a model
says, on which path, is a `Reading`; when it is asked, a law of time, see `times`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.errors import InputError
from jaxformer.metrics import Mean, Metrics
from jaxformer.objectives.condition import Classes
from jaxformer.objectives.paths import Kind, Reading, Velocity, over
from jaxformer.objectives.times import Law, Uniform, times

VELOCITY = Reading()
UNIFORM = Uniform()


def errors(
    says: Velocity,
    x: Float[Array, "B ..."],
    key: Array,
    *,
    reading: Reading = VELOCITY,
    law: Law = UNIFORM,
    target: Kind = "velocity",
) -> Float[Array, " B"]:
    """The squared error of each row at a time of its own, a mean over its numbers; float32.

    Args:
      says: `(x_t, t [B]) -> ` what `reading` says it is, of the shape of `x`, or with more
        channels, which are left out (SiT's).
      x: data.
      key: for times and noise.
      reading: what the model says, on which path.
      law: when; the times are drawn one in each of B parts of the law.
      target: in what the error is counted. One and the same conversion is made of what is
        said and of the truth, so that its `least` bounds the weight and moves no optimum.
    """
    when, which = jax.random.split(key)
    t = law.quantile(times(when, x.shape[0]))
    x = x.astype(jnp.float32)
    noise = jax.random.normal(which, x.shape)
    p = reading.path.at(t)
    at = over(p.data, x) * x + over(p.noise, x) * noise
    rate = over(p.data_rate, x) * x + over(p.noise_rate, x) * noise
    truth = {"velocity": rate, "noise": noise, "data": x}[reading.kind]
    said = says(at, t)[..., : x.shape[-1]].astype(jnp.float32)
    found, wanted = (getattr(reading, target)(one, at, t) for one in (said, truth))
    return ((found - wanted) ** 2).reshape(len(x), -1).mean(-1)


def loss(
    says: Velocity,
    x: Float[Array, "B ..."],
    key: Array,
    *,
    weight: Float[Array, " B"] | None = None,
    **law: Any,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean of `errors`, whose args these are; `weight` is 0 for padding.

    Example:
      >>> x = jnp.zeros((4, 2))  # All data is 0, so the velocity is x / t.
      >>> value, _ = loss(lambda x, t: x / t[:, None], x, jax.random.key(0))
      >>> float(value) < 1e-10
      True
    """
    each = errors(says, x, key, **law)
    if weight is None:
        return each.mean(), {}
    real = weight > 0
    return jnp.where(real, each, 0).sum() / jnp.maximum(real.sum(), 1), {}


@dataclasses.dataclass(frozen=True)
class Flow:
    """Flow matching of `batch["image"]`, given `batch["label"]` where there are classes.

    The model is called `(x, t, label)`, without classes `(x, t)`.
    """

    classes: Classes | None = None
    reading: Reading = VELOCITY
    law: Law = UNIFORM
    target: Kind = "velocity"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The entries of a batch that it reads."""
        return ("image",) if self.classes is None else ("image", "label")

    def arguments(self, image: Array, *label: Array) -> tuple[Array, ...]:
        """What the model is called with, of such a batch."""
        return (image, jnp.zeros(image.shape[0]), *label)

    def check(self, model: Any, pipeline: Any) -> None:
        """Raises InputError where model, data and objective do not fit."""
        if self.target not in ("velocity", "noise", "data"):
            raise InputError(f"target={self.target!r} must be one of velocity, noise, data")
        if self.classes is not None:
            self.classes.check(model, pipeline)

    def loss(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean squared error over the batch.

        Args:
          apply: `model.apply`: `({"params": params}, x, t, label, train=..., rngs=...)`.
          params: the model's parameters.
          batch: `image` `[B, Y, X, C]`, `label` `[B]`, optionally `weight` `[B]`.
          key: for times, noise, and what the model draws: labels left out, dropout.
        """
        key, more = jax.random.split(key)
        image, *label = (batch[name] for name in self.inputs)

        def says(x, t):
            options = {"train": True, "rngs": {"dropout": more}}
            return apply({"params": params}, x, t, *label, **options)

        return loss(says, image, key, weight=batch.get("weight"), **self._options)

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> Metrics:
        """The same error, with all labels given; times and noise are those of the key."""
        image, *label = (batch[name] for name in self.inputs)

        def says(x, t):
            return apply({"params": params}, x, t, *label)

        each = errors(says, image, key, **self._options)
        real = batch.get("weight", jnp.ones(each.shape)) > 0
        total = jnp.where(real, each, 0).sum()
        return {"loss": Mean(total, real.sum(dtype=jnp.int32))}

    def velocity(self, says: Velocity) -> Velocity:
        """The velocity by a model that says what `reading` reads: what a sampler follows."""

        def velocity(x, t):
            return self.reading.velocity(says(x, t)[..., : x.shape[-1]], x, t)

        return velocity

    @property
    def _options(self) -> dict[str, Any]:
        return {"reading": self.reading, "law": self.law, "target": self.target}
