"""Alignment beside another objective: early tokens learn to say what an encoder sees.

REPA, Yu et al. 2024 (arXiv 2410.06940). What the encoder sees of the clean picture is data,
`batch["seen"]`, so that any encoder will do and none runs within a step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.errors import InputError
from jaxformer.metrics import Metrics
from jaxformer.objectives.distill import cosine


def apart(said: Float[Array, "B T D"], seen: Float[Array, "B T D"]) -> Float[Array, " B"]:
    """One minus the cosine of each pair of tokens, a mean over a row's; in float32.

    REPA's own loss is this minus 1, which has the same gradient.
    """
    return cosine(said, seen).mean(-1)


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Another objective, such as a `Flow`, and `weight` times how far tokens are apart.

    The model has a method `align`, see `models.aligned_dit`; a batch has `seen` `[B, T, D]`
    where the other objective has an image. What is evaluated is the other objective alone.
    """

    base: Any
    weight: float = 0.5

    @property
    def inputs(self) -> tuple[str, ...]:
        """The entries of a batch that it reads: those of the other one."""
        return self.base.inputs

    @property
    def classes(self) -> Any:
        """The other one's."""
        return self.base.classes

    @property
    def reading(self) -> Any:
        """The other one's: how samplers read the model."""
        return self.base.reading

    def arguments(self, *inputs: Array) -> tuple[Array, ...]:
        """What the model is called with."""
        return self.base.arguments(*inputs)

    def check(self, model: Any, pipeline: Any) -> None:
        """Raises InputError where model, data and objective do not fit."""
        self.base.check(model, pipeline)
        if not hasattr(model, "align"):
            raise InputError(
                f"{type(model).__name__} has no tokens to align; take an AlignedDiT, or "
                "objective.base alone"
            )

    def loss(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The other loss and the weighed mean; args are the other one's."""
        said = []

        def spy(*args, **options):
            made, tokens = apply(*args, method="align", **options)
            said.append(tokens)
            return made

        value, found = self.base.loss(spy, params, batch, key)
        each = apart(said[-1], batch["seen"])
        real = batch.get("weight", jnp.ones(each.shape)) > 0
        away = jnp.where(real, each, 0).sum() / jnp.maximum(real.sum(), 1)
        return value + self.weight * away, found | {"apart": away}

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> Metrics:
        """Metrics of the other objective."""
        return self.base.measure(apply, params, batch, key)
