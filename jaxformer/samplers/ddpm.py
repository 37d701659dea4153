"""From noise to data down a chain of Gaussian steps: DDPM, and DDIM with its eta.

Ho et al. 2020 (arXiv 2006.11239), Song et al. 2020 (2010.02502). Of a chain with steps left
out, `objectives.chain.respaced`, the model is told the times of the whole one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxformer.errors import InputError
from jaxformer.objectives.chain import Chain, Spacing, respaced, take
from jaxformer.objectives.gaussian import Guess
from jaxformer.objectives.paths import Velocity
from jaxformer.samplers.noise import normal
from jaxformer.samplers.ode import Rows

Denoise = Callable[[Rows, Int[Array, ""]], Guess]
KeepStep = Callable[[Rows, Int[Array, ""]], Rows]


def sample(
    denoise: Denoise,
    x: Rows,
    key: Array,
    *,
    chain: Chain,
    eta: float | None = None,
    clip: float | None = None,
    keep: KeepStep | None = None,
) -> Rows:
    """Goes down the whole of `chain`; one program, with a loop inside.

    Args:
      denoise: `(x, step) -> Guess`, as `objectives.gaussian.Gaussian.guess` makes.
      x: normal noise.
      key: one for all, or one a row.
      chain: whose steps are taken, the last first.
      eta: None is DDPM, with the learned variance, or that of the posterior if none is.
        A number is DDIM: 0 adds no noise, 1 adds the posterior's, which is DDPM again.
      clip: the data is between minus this and this: 1 for pixels, None for latents.
      keep: `(x, step) -> x` after the step to that number, -1 for data.
    """

    def body(x, i):
        guess = denoise(x, i)
        rows = jnp.full(x.shape[0], i)
        data = guess.data if clip is None else jnp.clip(guess.data, -clip, clip)
        if eta is None:
            log = guess.log_variance
            log = take(chain.log_variance, rows, x) if log is None else log
            moved, spread = chain.posterior(data, x, rows), jnp.exp(log / 2)
        else:
            sigma = eta * np.sqrt(chain.variance)
            along = np.sqrt(1 - chain.before - sigma**2)
            noise = chain.noise_of(data, x, rows)
            moved = take(np.sqrt(chain.before), rows, x) * data + take(along, rows, x) * noise
            spread = take(sigma, rows, x)
        moved = moved + jnp.where(i > 0, spread, 0) * normal(key, x.shape, i)
        moved = moved.astype(x.dtype)
        return (moved if keep is None else keep(moved, i - 1)), None

    return jax.lax.scan(body, x, jnp.arange(len(chain))[::-1])[0]


def invert(denoise: Denoise, x: Rows, *, chain: Chain) -> Rows:
    """Noise out of data by DDIM's steps backwards, eta = 0; `sample` comes back, nearly."""

    def body(x, i):
        guess = denoise(x, i)
        rows = jnp.full(x.shape[0], i)
        noise = chain.noise_of(guess.data, x, rows)
        return chain.forward(guess.data, rows + 1, noise).astype(x.dtype), None

    return jax.lax.scan(body, x, jnp.arange(len(chain) - 1))[0]


@dataclasses.dataclass(frozen=True)
class Ddpm:
    """`sample` in so many of the chain's steps, as a config names it."""

    steps: int = 250
    eta: float | None = None
    clip: float | None = None
    spacing: Spacing = "even"

    def draw(
        self, says: Velocity, objective: Any, x: Rows, key: Array, keep: KeepStep | None = None
    ) -> Rows:
        """Data out of the noise `x`, by a model that learned an `objectives.gaussian`.

        Raises:
          InputError: another objective, or more steps than its chain has.
        """
        whole = getattr(objective, "chain", None)
        if whole is None:
            raise InputError(
                f"{type(objective).__name__} has no chain of steps to go down; draw by Ode, "
                "Sde or DpmSolver"
            )
        table = respaced(whole, self.steps, self.spacing)
        denoise = objective.guess(says, table)
        return sample(denoise, x, key, chain=table, eta=self.eta, clip=self.clip, keep=keep)
