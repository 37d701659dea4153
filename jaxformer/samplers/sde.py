"""From noise to data along a velocity with noise added on the way, by Euler and Maruyama.

The law at every time is that of the ordinary equation, whatever the noise: what is added is
taken back along the score. Errors of early steps are forgotten, and more steps are needed.
Source: Ma et al. 2024 (SiT, arXiv 2401.08740).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxformer.errors import InputError
from jaxformer.objectives.paths import Reading, Velocity
from jaxformer.samplers.noise import normal
from jaxformer.samplers.ode import Keep, Rows, reading_of


def sample(
    says: Velocity,
    x: Rows,
    key: Array,
    *,
    reading: Reading,
    steps: int = 250,
    scale: float = 1.0,
    last: float = 0.04,
    keep: Keep | None = None,
) -> Rows:
    """Follows the velocity and adds noise of variance `scale * noise(t)` in unit time.

    Args:
      says: `(x, t [B]) -> ` what `reading` says it is.
      x: normal noise, at t = 1.
      key: one for all, or one a row.
      reading: what the model says, on which path.
      steps: from 1 to `last` all but one of them, even; then one to 0 without noise.
      scale: 1 is SiT's "sigma", 2 is REPA's; 0 is Euler's ordinary step.
      last: how long the last step is: SiT and REPA have 0.04.
      keep: `(x, t) -> x` after each step, such as `inpaint.keeping`.

    Raises:
      InputError: fewer than 2 steps, or a last step that is no part of time.
    """
    if steps < 2 or not 0 < last < 1:
        raise InputError(f"steps={steps} must be 2 or more, and last={last} in (0, 1)")
    times = np.append(np.linspace(1, last, steps), 0.0)
    times = jnp.asarray(times, jnp.float32)

    def body(x, inputs):
        number, now, then = inputs
        t = jnp.full(x.shape[0], now)
        said = says(x, t)[..., : x.shape[-1]]
        added = scale * reading.path.at(now).noise
        drift = reading.velocity(said, x, t) - added / 2 * reading.score(said, x, t)
        spread = jnp.sqrt(added * (now - then)) * (then > 0)
        moved = x + (then - now) * drift + spread * normal(key, x.shape, number)
        moved = moved.astype(x.dtype)
        return (moved if keep is None else keep(moved, then)), None

    return jax.lax.scan(body, x, (jnp.arange(steps), times[:-1], times[1:]))[0]


@dataclasses.dataclass(frozen=True)
class Sde:
    """`sample` with these numbers, as a config names it."""

    steps: int = 250
    scale: float = 1.0
    last: float = 0.04

    def draw(
        self, says: Velocity, objective: Any, x: Rows, key: Array, keep: Keep | None = None
    ) -> Rows:
        """Data out of the noise `x` see `ode.reading_of`."""
        numbers = dataclasses.asdict(self)
        reading = reading_of(objective)
        return sample(says, x, key, reading=reading, keep=keep, **numbers)
