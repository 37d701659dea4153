"""How many tokens are masked at a time: schedules of masked diffusion.

Time runs from 0, all of the data, to 1, all masked. `masked(t)` is the probability that a
token is masked, and `rate(t)` its derivative by itself, `masked' / masked`: what the nats of
a masked token weigh in the bound. The bound is the same for all schedules that reach from 0
to 1 (Shi et al. 2024, arXiv 2406.04329; Sahoo et al. 2024, 2406.07524); they differ in
variance, and in where a model learns most.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.errors import InputError

Times = Float[Array, "*B"]


@runtime_checkable
class Schedule(Protocol):
    """A schedule; `unmasked_at_end` is `1 - masked(1)`, which costs `log V` nats a token."""

    @property
    def unmasked_at_end(self) -> float:
        """What is not masked at time 1."""
        ...

    def masked(self, t: Times) -> Times:
        """The probability that a token is masked at `t`."""
        ...

    def rate(self, t: Times) -> Times:
        """`masked'(t) / masked(t)`, for `t` above 0."""
        ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """`t` of all tokens."""

    unmasked_at_end: float = dataclasses.field(default=0.0, init=False)

    def masked(self, t: Times) -> Times:
        """The probability that a token is masked."""
        return t

    def rate(self, t: Times) -> Times:
        """The weight."""
        return 1 / t


@dataclasses.dataclass(frozen=True)
class Cosine:
    """`sin(pi t / 2)` of all: most of the time most of it is masked. MD4's."""

    unmasked_at_end: float = dataclasses.field(default=0.0, init=False)

    def masked(self, t: Times) -> Times:
        """The probability that a token is masked."""
        return jnp.sin(math.pi / 2 * t)

    def rate(self, t: Times) -> Times:
        """The weight."""
        return math.pi / 2 / jnp.tan(math.pi / 2 * t)


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """`t ** power` of all. MD4's."""

    power: float = 2.0
    unmasked_at_end: float = dataclasses.field(default=0.0, init=False)

    def __post_init__(self):
        if self.power <= 0:
            raise InputError(f"power={self.power} must be above 0: nothing is masked at time 0")

    def masked(self, t: Times) -> Times:
        """The probability that a token is masked."""
        return t**self.power

    def rate(self, t: Times) -> Times:
        """The weight."""
        return self.power / t


@dataclasses.dataclass(frozen=True)
class LogLinear:
    """`(1 - end) t` of all: MDLM's, whose noise is `-log(1 - (1 - end) t)`."""

    end: float = 1e-3

    def __post_init__(self):
        if not 0 <= self.end < 1:
            raise InputError(
                f"end={self.end} must be a share that stays seen, 0 or more, below 1"
            )

    @property
    def unmasked_at_end(self) -> float:
        """What is not masked at time 1."""
        return self.end

    def masked(self, t: Times) -> Times:
        """The probability that a token is masked."""
        return (1 - self.end) * t

    def rate(self, t: Times) -> Times:
        """The weight."""
        return 1 / t


@dataclasses.dataclass(frozen=True)
class Clipped:
    """Between `low` and `high` of all, evenly: to train with less variance, no bound.

    Source: BD3-LM, arXiv 2503.09573; `objectives.clips.least_variance` chooses.
    """

    low: float
    high: float
    unmasked_at_end: float = dataclasses.field(default=0.0, init=False)

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise InputError(
                f"low={self.low}, high={self.high} must be shares that rise, from 0 to 1"
            )

    def masked(self, t: Times) -> Times:
        """The probability that a token is masked."""
        return self.low + (self.high - self.low) * t

    def rate(self, t: Times) -> Times:
        """The weight that `Linear` has where so many are masked."""
        return 1 / self.masked(t)
