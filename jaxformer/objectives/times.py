"""When a model is trained: laws of the time of a row, drawn in strata over the batch.

Time runs from 0, data, to 1, noise. A law of time is a weight of the loss in another form.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.errors import InputError
from jaxformer.ops.draw import uniform


def times(key: Array, *shape: int) -> Float[Array, "..."]:
    """Times in (0, 1), as many as `shape` says, one in each of so many equal parts.

    Each is uniform by itself, and a mean over all of them varies far less than over
    independent ones. The parts of one row lie in no order.
    """
    n = math.prod(shape)
    where, inside = jax.random.split(key)
    part = jax.random.permutation(where, n).astype(jnp.float32)
    found = (part + uniform(inside, (n,))) / n
    return jnp.clip(found, 2.0**-24, 1.0).reshape(shape)


@runtime_checkable
class Law(Protocol):
    """A law of time, by its quantiles."""

    def quantile(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The time that a share `u` of all lies below."""
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """All times alike."""

    def quantile(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The share itself."""
        return u


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """The sigmoid of a normal number: most in the middle.

    Mean 0 and deviation 1 are those of Stable Diffusion 3 (arXiv 2403.03206) and of
    LightningDiT. JiT (2511.13720) says -0.8 and 0.8 of a time whose 1 is data: 0.8, 0.8 here.
    """

    mean: float = 0.0
    deviation: float = 1.0

    def quantile(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Its quantile; never 0 or 1."""
        u = jnp.clip(u, 2.0**-24, 1 - 2.0**-24)
        return jax.nn.sigmoid(self.mean + self.deviation * jax.scipy.special.ndtri(u))


@dataclasses.dataclass(frozen=True)
class Mode:
    """Stable Diffusion 3's law of heavy tails, whose mode is the middle for `scale` above 0.

    `1 - u - scale (cos(pi u / 2) ** 2 - 1 + u)`, with `u` counted down, so that more is more
    noise; `scale` from -1 to 2 / (pi - 2), within which it is a law.
    """

    scale: float = 1.29

    def __post_init__(self):
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise InputError(f"scale={self.scale} must lie in [-1, 1.751]; SD3 has 1.29")

    def quantile(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Its quantile."""
        u = 1 - u
        return 1 - u - self.scale * (jnp.cos(math.pi / 2 * u) ** 2 - 1 + u)


@dataclasses.dataclass(frozen=True)
class Shifted:
    """Another law moved towards noise by `shift` above 1, towards data below 1.

    `shift t / (1 + (shift - 1) t)`: of the times of larger pictures, Stable Diffusion 3, eq.
    23. A shift of a time whose 1 is data, such as LightningDiT's 0.3, is `1 / shift` here.
    """

    shift: float
    law: Law = Uniform()

    def __post_init__(self):
        if self.shift <= 0:
            raise InputError(f"shift={self.shift} must be above 0; 1 moves nothing")

    def quantile(self, u: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Its quantile."""
        return shifted(self.law.quantile(u), self.shift)


def shifted(t: Float[Array, "*B"], shift: float) -> Float[Array, "*B"]:
    """Times moved towards noise, see `Shifted`; 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)
