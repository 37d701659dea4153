"""Paths from data to noise, and what a model may say of a point of one.

A path is `x_t = data(t) x + noise(t) e` with `e` normal of variance 1; time runs from 0,
data, to 1, noise. Its velocity is `dx_t / dt`. A model that says one of velocity, noise and
data has said all of them, because `x_t` is known: `Reading` converts.

Papers disagree about the time. Ours is that of DDPM, Stable Diffusion 3, REPA and MeanFlow,
with noise at 1. SiT, LightningDiT and JiT have data at 1: `turned` is where such a velocity
becomes ours, and ours becomes such a one.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.errors import InputError

Kind = Literal["velocity", "noise", "data"]
Velocity = Callable[[Float[Array, "B ..."], Float[Array, " B"]], Float[Array, "B ..."]]


class Point(NamedTuple):
    """Weights of data and noise at a time, and how fast they change."""

    data: Array
    noise: Array
    data_rate: Array
    noise_rate: Array


@runtime_checkable
class Path(Protocol):
    """A path by its weights."""

    def at(self, t: Float[Array, "*B"]) -> Point:
        """The weights at `t`, each of its shape."""
        ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """A straight line: rectified flow (Liu et al. 2022, arXiv 2209.03003), SiT's "Linear"."""

    def at(self, t: Float[Array, "*B"]) -> Point:
        """The weights."""
        one = jnp.ones_like(t)
        return Point(1 - t, t, -one, one)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """A quarter of a circle, which keeps the variance: SiT's "GVP" (arXiv 2401.08740)."""

    def at(self, t: Float[Array, "*B"]) -> Point:
        """The weights."""
        c, s = jnp.cos(math.pi / 2 * t), jnp.sin(math.pi / 2 * t)
        return Point(c, s, -math.pi / 2 * s, math.pi / 2 * c)


@dataclasses.dataclass(frozen=True)
class VP:
    """The diffusion that keeps the variance, in continuous time (Song et al. 2020,
    arXiv 2011.13456): SiT's "VP". At time 0 the noise grows without bound; at 1 some data,
    0.0066 with these numbers, is left."""

    least: float = 0.1
    most: float = 20.0

    def at(self, t: Float[Array, "*B"]) -> Point:
        """The weights."""
        log = -(self.most - self.least) * t**2 / 4 - self.least * t / 2
        rate = -(self.most - self.least) * t / 2 - self.least / 2
        a, s = jnp.exp(log), jnp.sqrt(-jnp.expm1(2 * log))
        return Point(a, s, rate * a, -rate * a**2 / s)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the output of a model is read: of which `kind` it is, on which path.

    `least` bounds from below the weights that a conversion divides by. JiT (arXiv
    2511.13720) has 0.05; what a model of data says of the velocity is too small below that.
    """

    kind: Kind = "velocity"
    path: Path = Linear()
    least: float = 1e-3

    def __post_init__(self):
        if self.kind not in ("velocity", "noise", "data"):
            raise InputError(f"kind={self.kind!r} must be one of velocity, noise, data")

    def velocity(self, said: Array, x: Array, t: Float[Array, " B"]) -> Array:
        """The velocity at `x`, in which a model said `said`."""
        if self.kind == "velocity":
            return said
        p, weight = self._at(x, t)
        if self.kind == "noise":
            return p.data_rate * (x - p.noise * said) / weight(p.data) + p.noise_rate * said
        return p.data_rate * said + p.noise_rate * (x - p.data * said) / weight(p.noise)

    def data(self, said: Array, x: Array, t: Float[Array, " B"]) -> Array:
        """The data that `x` came from."""
        if self.kind == "data":
            return said
        p, weight = self._at(x, t)
        if self.kind == "noise":
            return (x - p.noise * said) / weight(p.data)
        return (p.noise_rate * x - p.noise * said) / weight(_turn(p))

    def noise(self, said: Array, x: Array, t: Float[Array, " B"]) -> Array:
        """The noise in `x`."""
        if self.kind == "noise":
            return said
        p, weight = self._at(x, t)
        if self.kind == "data":
            return (x - p.data * said) / weight(p.noise)
        return (p.data * said - p.data_rate * x) / weight(_turn(p))

    def score(self, said: Array, x: Array, t: Float[Array, " B"]) -> Array:
        """The gradient of the log density of `x_t`: the noise over minus its weight."""
        p, weight = self._at(x, t)
        return -self.noise(said, x, t) / weight(p.noise)

    def _at(self, x: Array, t: Array):
        p = Point(*(over(w, x) for w in self.path.at(t)))
        return p, lambda w: jnp.maximum(w, self.least)


def _turn(p: Point) -> Array:
    """1 for a line: the determinant that velocity and `x` are solved by. Never negative."""
    return p.data * p.noise_rate - p.noise * p.data_rate


def over(weight: Float[Array, " B"], x: Float[Array, "B ..."]) -> Array:
    """A number a row, shaped to be multiplied with rows."""
    return weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim))


def turned(velocity: Velocity) -> Velocity:
    """A velocity under the other convention of time, which of the two it may be.

    From time 1 for data (SiT, LightningDiT, JiT) to time 1 for noise, or back: the time is
    counted from the other end, and the velocity points the other way.
    """
    return lambda x, t: -velocity(x, 1 - t)
