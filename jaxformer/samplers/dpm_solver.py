"""DPM-Solver++ (2M): from noise to data by what a model says the data is, of second order.

Lu et al. 2022 (arXiv 2211.01095). Between two steps the noise is followed exactly and only
the guess of the data is taken to be a line in half the log of signal over noise. It asks once
a step, as Euler does. Written in the weights themselves, so that it may begin at all noise
and end at all data.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxformer.objectives.paths import Path, Velocity
from jaxformer.samplers.ode import Keep, Rows, grid, reading_of


def sample(
    data: Velocity,
    x: Rows,
    *,
    path: Path,
    steps: int = 20,
    start: float = 1.0,
    end: float = 0.0,
    shift: float = 1.0,
    keep: Keep | None = None,
) -> Rows:
    """Data out of noise; the first step and one to t = 0 are of first order.

    Args:
      data: `(x, t [B]) -> ` the data that `x` is guessed to come from, as `Reading.data`.
      x: normal noise, at `start`.
      path: on which it is noisy.
      steps: of the grid of times.
      start: the first time.
      end: the last.
      shift: above 1 for more steps near noise.
      keep: `(x, t) -> x` after each step, such as `inpaint.keeping`.

    Raises:
      InputError: no steps, or times beyond 0 and 1.
    """
    times = grid(steps, start, end, shift)
    p = path.at(times)
    signal, lost = (jnp.log(jnp.where(w < 1e-6, 0, w)) for w in (p.data, p.noise))
    signal = signal - lost  # From -inf to inf.
    wide = signal[1:] - signal[:-1]
    before = jnp.concatenate([jnp.full(1, jnp.inf), wide[:-1]])
    # How far the line goes on: nothing where a step is without end, or there was none.
    ahead = jnp.where(jnp.isfinite(wide) & jnp.isfinite(before), wide / before / 2, 0)
    left = p.noise[1:] / p.noise[:-1]
    gained = p.data[1:] - p.data[:-1] * left

    def body(carry, inputs):
        x, last = carry
        now, then, ahead, left, gained = inputs
        found = data(x, jnp.full(x.shape[0], now)).astype(x.dtype)
        moved = left * x + gained * (found + ahead * (found - last))
        moved = moved.astype(x.dtype)
        return ((moved if keep is None else keep(moved, then)), found), None

    inputs = (times[:-1], times[1:], ahead, left, gained)
    return jax.lax.scan(body, (x, jnp.zeros_like(x)), inputs)[0][0]


@dataclasses.dataclass(frozen=True)
class DpmSolver:
    """`sample` with these numbers, as a config names it."""

    steps: int = 20
    shift: float = 1.0
    end: float = 0.0

    def draw(
        self, says: Velocity, objective: Any, x: Rows, key: Array, keep: Keep | None = None
    ) -> Rows:
        """Data out of the noise `x` see `ode.reading_of`; no draws."""

        reading = reading_of(objective)

        def data(x, t):
            return reading.data(says(x, t)[..., : x.shape[-1]], x, t)

        numbers = dataclasses.asdict(self)
        return sample(data, x, path=reading.path, keep=keep, **numbers)
