"""From noise to data in few steps, by a model of mean velocities: `objectives.mean_flow`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxformer.errors import InputError
from jaxformer.objectives.mean_flow import MeanFlow, Says
from jaxformer.samplers.ode import Keep, Rows, grid


def sample(says: Says, x: Rows, *, steps: int = 4, keep: Keep | None = None) -> Rows:
    """Jumps from t = 1 to 0 in `steps` equal spans; one is enough for a perfect model.

    Args:
      says: `(x, (t, span) [B, 2]) -> ` the mean velocity from `t` back to `t - span`.
      x: normal noise.
      steps: how often the model is asked.
      keep: `(x, t) -> x` after each step, such as `inpaint.keeping`.
    """
    times = grid(steps)

    def body(x, ends):
        now, then = ends
        t = jnp.broadcast_to(jnp.stack([now, now - then])[None], (x.shape[0], 2))
        moved = (x + (then - now) * says(x, t)).astype(x.dtype)
        return (moved if keep is None else keep(moved, then)), None

    return jax.lax.scan(body, x, (times[:-1], times[1:]))[0]


@dataclasses.dataclass(frozen=True)
class Jumps:
    """`sample` with this number, as a config names it."""

    steps: int = 4

    def draw(
        self, says: Says, objective: Any, x: Rows, key: Array, keep: Keep | None = None
    ) -> Rows:
        """Data out of the noise `x`; the key is not used.

        Raises:
          InputError: a model that did not learn mean velocities.
        """
        if not isinstance(objective, MeanFlow):
            raise InputError(
                f"{type(objective).__name__} has no mean velocities to jump by; draw by Ode, "
                "or learn by MeanFlow"
            )

        def cut(x, t):
            return says(x, t)[..., : x.shape[-1]]

        return sample(cut, x, steps=self.steps, keep=keep)
