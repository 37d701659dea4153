"""What is known of a picture stays, and the rest is drawn beside it.

By putting the known part back, as noisy as it should be, after each step: Song et al. 2020
(arXiv 2011.13456), appendix I. The rest sees it and leans to what fits, which is no exact
draw of what is likely given the known part.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxformer.objectives.chain import Chain
from jaxformer.objectives.paths import Path
from jaxformer.samplers.ode import Keep, Rows


def keeping(known: Rows, mask: Bool[Array, "#B ..."], noise: Rows, path: Path) -> Keep:
    """A `keep` for the samplers: after each step the known part is as noisy as its time says.

    Args:
      known: data; what is not known may hold anything.
      mask: True where it is known, of a shape that broadcasts to `known`.
      noise: the noise that the draw begins with; the known part follows its own line.
      path: of the sampler.
    """

    def keep(x, t):
        p = path.at(t)
        return jnp.where(mask, p.data * known + p.noise * noise, x).astype(x.dtype)

    return keep


def keeping_steps(
    known: Rows, mask: Bool[Array, "#B ..."], noise: Rows, chain: Chain
) -> Callable[[Rows, Int[Array, ""]], Rows]:
    """The same for `ddpm.sample`, down the steps of `chain`."""
    kept = np.append(1.0, chain.kept)

    def keep(x, i):
        signal, lost = (jnp.asarray(np.sqrt(w), x.dtype)[i + 1] for w in (kept, 1 - kept))
        return jnp.where(mask, signal * known + lost * noise, x).astype(x.dtype)

    return keep
