"""From noise to data along a velocity, by Euler's or Heun's steps, and back again.

`sample(velocity, x, steps=50)` follows `dx / dt = velocity(x, t)` from t = 1, noise, to 0,
data; with `start=0, end=1` it goes the other way. Rows do not depend on each other, so the
program runs on any mesh without a word from one device to another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxformer.errors import InputError
from jaxformer.objectives.paths import Reading, Velocity
from jaxformer.objectives.times import shifted

Method = Literal["euler", "heun"]
Rows = Float[Array, "B ..."]
Keep = Callable[[Rows, Float[Array, ""]], Rows]


def grid(
    steps: int, start: float = 1.0, end: float = 0.0, shift: float = 1.0
) -> Float[Array, " n"]:
    """Times from `start` to `end`, `steps + 1` of them; `shift` as in `times.Shifted`."""
    if steps < 1:
        raise InputError(f"steps={steps} must be 1 or more")
    for name, value in (("start", start), ("end", end)):
        if not 0 <= value <= 1:
            raise InputError(f"{name}={value} must lie in [0, 1]: 0 is data and 1 is noise")
    even = jnp.asarray(np.linspace(start, end, steps + 1), jnp.float32)
    return shifted(even, shift)


def sample(
    velocity: Velocity,
    x: Rows,
    *,
    steps: int = 50,
    method: Method = "heun",
    start: float = 1.0,
    end: float = 0.0,
    shift: float = 1.0,
    keep: Keep | None = None,
) -> Rows:
    """Follows the velocity; one program, with a loop inside.

    Args:
      velocity: `(x, t [B]) -> ` of the shape of `x`.
      x: where to begin: normal noise, at t = 1.
      steps: of the grid of times.
      method: "euler" has an error that falls as the step, and asks once a step; "heun" one
        that falls as its square, and asks twice, in the last step to 0 once, because there
        models of data or of noise have no velocity to tell.
      start: the first time.
      end: the last.
      shift: above 1 for more steps near noise.
      keep: `(x, t) -> x` after each step, such as `inpaint.keeping`.

    Raises:
      InputError: no steps, times beyond 0 and 1, another method.

    Example:
      >>> x = sample(lambda x, t: x, jnp.ones((1, 1)), steps=100)  # x(0) = x(1) / e
      >>> round(float(x[0, 0]), 3)
      0.368
    """
    if method not in ("euler", "heun"):
        raise InputError(f"method={method!r} must be one of euler, heun")
    times = grid(steps, start, end, shift)

    def rows(t):
        return jnp.full(x.shape[0], t)

    def body(x, ends):
        now, then = ends
        v = velocity(x, rows(now))
        moved = x + (then - now) * v
        if method == "heun":
            again = jax.lax.cond(
                then > 0, lambda: velocity(moved, rows(then)).astype(v.dtype), lambda: v
            )
            moved = x + (then - now) * (v + again) / 2
        moved = moved.astype(x.dtype)
        return (moved if keep is None else keep(moved, then)), None

    return jax.lax.scan(body, x, (times[:-1], times[1:]))[0]


@dataclasses.dataclass(frozen=True)
class Ode:
    """`sample` with these numbers, as a config names it."""

    steps: int = 50
    method: Method = "heun"
    shift: float = 1.0
    end: float = 0.0

    def draw(
        self, says: Velocity, objective: Any, x: Rows, key: Array, keep: Keep | None = None
    ) -> Rows:
        """Data out of the noise `x`, see `reading_of`; the key is not used."""
        reading = reading_of(objective)

        def velocity(x, t):
            return reading.velocity(says(x, t)[..., : x.shape[-1]], x, t)

        return sample(velocity, x, keep=keep, **dataclasses.asdict(self))


def reading_of(objective: Any) -> Reading:
    """How what a model of this objective says is read.

    Raises:
      InputError: it is one of a chain of steps, which has no velocity.
    """
    reading = getattr(objective, "reading", None)
    if reading is None:
        raise InputError(
            f"{type(objective).__name__} has steps and no velocity to follow; draw by Ddpm"
        )
    return reading
