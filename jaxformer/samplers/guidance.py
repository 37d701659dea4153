"""Guidance without a classifier: away from what is said of no class at all.

Ho and Salimans 2022 (arXiv 2207.12598); in an interval of time, Kynkäänniemi et al. 2024
(2404.07724). Both are asked in one batch, each row beside its other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxformer.errors import InputError
from jaxformer.objectives.condition import Classes, known
from jaxformer.objectives.paths import Velocity, over

Says = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Guidance:
    """`without + scale (with - without)` at times from `first` to `last`; 1 is no guidance.

    `channels` are guided, all of the data if not given; the others, a learned variance among
    them, are those of the class. DiT's published numbers have 3 of 4 channels guided, and
    diffusers guides all 4. Times are ours, 1 for noise: an interval that its paper gives in
    a time whose 1 is data is `first=1 - high, last=1 - low`.
    """

    scale: float = 1.0
    channels: int | None = None
    first: float = 0.0
    last: float = 1.0

    def __post_init__(self):
        if not 0 <= self.first < self.last <= 1:
            raise InputError(
                f"guidance from first={self.first} to last={self.last} must be part of [0, 1]"
            )

    def check(self, model: Any, classes: Classes | None) -> None:
        """Raises InputError where there is no null label, or a model never learned it."""
        if self.scale == 1:
            return
        if classes is None:
            raise InputError(
                f"guidance.scale={self.scale} needs a null label, and the objective has no "
                "classes; set guidance.scale=1"
            )
        if getattr(model, "label_dropout", 1) == 0:
            raise InputError(
                f"guidance.scale={self.scale} needs a null label, and with "
                "model.label_dropout=0 none was learned; set guidance.scale=1"
            )

    def of(
        self, says: Says, label: Int[Array, " B"] | None, classes: Classes | None
    ) -> Velocity:
        """A model of `(x, t)` alone, of one of `(x, t, label)`.

        Raises:
          InputError: no classes to guide by, or a label outside the table.
        """
        self.check(None, classes)
        if label is None or classes is None:
            return lambda x, t: says(x, t)  # pyright: ignore[reportCallIssue]
        known(label, classes)
        if self.scale == 1:
            return lambda x, t: says(x, t, label)

        def guided(x, t):
            def both(a, b):  # Neighbours: where rows are split over devices, none moves.
                return jnp.stack([a, b], 1).reshape(2 * len(a), *a.shape[1:])

            none = jnp.full_like(label, classes.null)
            said = says(both(x, x), both(t, t), both(label, none))
            said = said.reshape(len(x), 2, *said.shape[1:])
            its, without = said[:, 0], said[:, 1]
            now = t.reshape(len(t), -1)[:, 0]  # What follows it is a span.
            inside = (self.first <= now) & (now <= self.last)
            scale = over(jnp.where(inside, self.scale, 1.0), its)
            moved = without + scale * (its - without)
            C = x.shape[-1] if self.channels is None else self.channels
            return jnp.concatenate([moved[..., :C], its[..., C:]], -1)

        return guided


NONE = Guidance()
