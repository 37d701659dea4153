"""Which clipped schedule a model learns by with the least variance: BD3-LM's choice."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxformer.errors import InputError
from jaxformer.objectives.schedules import Clipped
from jaxformer.objectives.unmask import FLOOR, by_time


def variances(
    nats_of: Callable[[Array, Array], Array],
    tokens: Int[Array, "B T"],
    key: Array,
    *,
    mask_id: int,
    block: int | None = None,
    hidden: Bool[Array, "B T"] | None = None,
    width: float = 0.5,
    step: float = 0.05,
) -> dict[Clipped, float]:
    """How much the loss of a row varies, in (nats a token) squared, by `Clipped` schedule.

    Of all intervals of at least `width` whose ends are multiples of `step`; `nats_of(noisy,
    tokens) -> [B, T]`, and `hidden` is what may be masked, all if not given. Source: BD3-LM,
    arXiv 2503.09573, whose grid and steps these are.
    """
    count = round(1 / step) if 0 < step <= 1 else 0
    if not math.isclose(count * step, 1):
        raise InputError(f"step={step} must divide 1; 0.05 is BD3-LM's")
    if not 0 < width <= 1:
        raise InputError(f"width={width} must be a share of the masked, above 0, up to 1")
    ends, found = np.linspace(0, 1, count + 1), {}
    may = jnp.ones(tokens.shape, bool) if hidden is None else hidden

    how: dict[str, Any] = {"mask_id": mask_id, "block": block, "hidden": may}
    nats_of = jax.jit(nats_of)
    some = np.asarray(may.any(1))  # Padding rows have no loss.
    for low, high in itertools.product(ends, ends):
        if high - low >= width - step / 2:
            schedule = Clipped(max(float(low), FLOOR), float(high))
            noisy = by_time(tokens, key, schedule=schedule, **how)
            each = jnp.where(noisy.weight > 0, nats_of(noisy.tokens, tokens), 0)
            rows = (each * noisy.weight).sum(1)[some] / may.sum(1)[some]
            found[schedule] = float(rows.var())
    return found


def least_variance(*args: Any, **how: Any) -> Clipped:
    """The `Clipped` schedule under which the loss of a row varies least; see `variances`."""
    found = variances(*args, **how)
    return min(found, key=found.__getitem__)
