"""A chain of Gaussian steps from data to noise, as tables in float64, and its closed forms.

`q(x_i | x_{i-1})` is normal about `sqrt(1 - beta_i) x_{i-1}` with variance `beta_i`. All else
follows: Ho et al. 2020 (arXiv 2006.11239), section 2. Steps count from 0, so that x_{-1} is
the data; a model is told `times[i]`, from 0 to 1.
"""

import dataclasses
import functools
import math
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.errors import InputError

Rows = Float[Array, "B ..."]
Steps = Int[Array, " B"]
Spacing = Literal["even", "stride"]


@runtime_checkable
class Betas(Protocol):
    """How much noise each step adds."""

    @property
    def steps(self) -> int:
        """How many there are."""
        ...

    def table(self) -> np.ndarray:
        """Their variances `[steps]`, float64."""
        ...


@dataclasses.dataclass(frozen=True)
class LinearBetas:
    """From 1e-4 to 0.02 in 1000 steps; with fewer, each adds so much more."""

    steps: int = 1000
    first: float = 1e-4
    last: float = 0.02

    def table(self) -> np.ndarray:
        """Their variances."""
        scale = 1000 / self.steps
        return np.linspace(scale * self.first, scale * self.last, self.steps)


@dataclasses.dataclass(frozen=True)
class CosineBetas:
    """Those that make `alpha_bar` a squared cosine: Nichol and Dhariwal, arXiv 2102.09672."""

    steps: int = 1000
    offset: float = 0.008
    most: float = 0.999

    def table(self) -> np.ndarray:
        """Their variances."""
        t = np.arange(self.steps + 1) / self.steps
        kept = np.cos((t + self.offset) / (1 + self.offset) * math.pi / 2) ** 2
        return np.minimum(1 - kept[1:] / kept[:-1], self.most)


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """Tables of a chain, each `[n]`, float64.

    `times` is what the model is told: of a chain with steps left out, those of the steps
    that are left. `kept` is alpha-bar, `before` that of the step before. The posterior
    `q(x_{i-1} | x_i, x_0)` is normal about `of_data x_0 + of_noisy x_i`, with `variance`,
    which is 0 at step 0; `log_variance` has there that of step 1.
    """

    betas: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.betas)

    @functools.cached_property
    def kept(self) -> np.ndarray:
        """Alpha-bar."""
        return np.cumprod(1 - self.betas)

    @functools.cached_property
    def before(self) -> np.ndarray:
        """Alpha-bar of the step before."""
        return np.append(1.0, self.kept[:-1])

    @functools.cached_property
    def variance(self) -> np.ndarray:
        """That of the posterior."""
        return self.betas * (1 - self.before) / (1 - self.kept)

    @functools.cached_property
    def log_variance(self) -> np.ndarray:
        """Its logarithm, finite."""
        return np.log(np.append(self.variance[1:2], self.variance[1:]))

    @functools.cached_property
    def of_data(self) -> np.ndarray:
        """The weight of the data in the posterior's mean."""
        return self.betas * np.sqrt(self.before) / (1 - self.kept)

    @functools.cached_property
    def of_noisy(self) -> np.ndarray:
        """The weight of what is noisy."""
        return (1 - self.before) * np.sqrt(1 - self.betas) / (1 - self.kept)

    def forward(self, x: Rows, i: Steps, noise: Rows) -> Rows:
        """A draw of `q(x_i | x_0)` by `noise`."""
        return take(np.sqrt(self.kept), i, x) * x + take(np.sqrt(1 - self.kept), i, x) * noise

    def step(self, x: Rows, i: Steps, noise: Rows) -> Rows:
        """A draw of `q(x_i | x_{i-1})` by `noise`."""
        return take(np.sqrt(1 - self.betas), i, x) * x + take(np.sqrt(self.betas), i, x) * noise

    def posterior(self, data: Rows, x: Rows, i: Steps) -> Rows:
        """The mean of `q(x_{i-1} | x_i, x_0)`."""
        return take(self.of_data, i, x) * data + take(self.of_noisy, i, x) * x

    def data_of(self, noise: Rows, x: Rows, i: Steps) -> Rows:
        """The data that makes `x` with this noise."""
        return (
            take(np.sqrt(1 / self.kept), i, x) * x
            - take(np.sqrt(1 / self.kept - 1), i, x) * noise
        )

    def noise_of(self, data: Rows, x: Rows, i: Steps) -> Rows:
        """The noise that makes `x` of this data."""
        return (x - take(np.sqrt(self.kept), i, x) * data) / take(np.sqrt(1 - self.kept), i, x)


def chain(betas: Betas) -> Chain:
    """The whole chain; the model is told `i / n`."""
    table = np.asarray(betas.table(), np.float64)
    if not ((table > 0) & (table < 1)).all():
        raise InputError(f"{betas}: every beta must lie in (0, 1); take more steps")
    return Chain(table, np.arange(len(table)) / len(table))


def respaced(whole: Chain, steps: int, spacing: Spacing = "even") -> Chain:
    """A chain of `steps` of the steps, which have the same alpha-bars and the same times.

    Args:
      whole: the chain that the model learned.
      steps: how many are left.
      spacing: "even" keeps the first and the last, what is between rounded to the nearest;
        "stride" keeps every k-th from the first, DDIM's. Both are DiT's.

    Raises:
      InputError: more steps than there are, or a stride that no integer makes.
    """
    n = len(whole)
    if not 1 <= steps <= n:
        raise InputError(
            f"steps={steps} must be from 1 to {n}: the schedule has no more; lower it"
        )
    if spacing == "even":
        stride = (n - 1) / (steps - 1) if steps > 1 else 1
        kept, at = [], 0.0
        for _ in range(steps):
            kept.append(round(at))
            at += stride
    else:
        strides = [k for k in range(1, n + 1) if len(range(0, n, k)) == steps]
        if not strides:
            raise InputError(
                f"steps={steps}: no stride leaves so many of {n}; take a divisor of {n}"
            )
        kept = list(range(0, n, strides[0]))
    bars = whole.kept[kept]
    betas = 1 - bars / np.append(1.0, bars[:-1])
    return Chain(betas, whole.times[kept])


def take(table: np.ndarray, i: Steps, x: Rows) -> Array:
    """Entries of a table, one a row, shaped to be multiplied with rows."""
    found = jnp.asarray(table, x.dtype)[i]
    return found.reshape(found.shape + (1,) * (x.ndim - 1))
