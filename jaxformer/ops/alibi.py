"""ALiBi: attention that loses with distance, instead of positions.

Source: Press et al. 2021, arXiv 2108.12409.
"""

from __future__ import annotations

import math

import numpy as np
from flax import struct
from jaxtyping import Array, Float


class Alibi(struct.PyTreeNode):
    """The logits of head `n` lose `slopes[n] * abs(t + offset - s)`.

    Slopes are constants: they get no gradient. `offset` is how many keys stand before the
    first query.
    """

    slopes: Float[Array, " N"]
    offset: int = struct.field(pytree_node=False, default=0)


def alibi_slopes(heads: int) -> np.ndarray:
    """The paper's slopes `[heads]`, float32: `2 ** (-8 i / heads)` for `i` from 1.

    Where `heads` is no power of two, the slopes of the next lower one come first, then
    every second of the next higher one's, as the paper's code has it.

    Raises:
      ValueError: `heads` is below 1.
    """
    if heads < 1:
        raise ValueError(f"alibi_slopes needs at least one head, got {heads}")
    lower = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8 / lower * np.arange(1, lower + 1))
    between = 2.0 ** (-4 / lower * np.arange(1, 2 * lower + 1, 2))
    return np.concatenate([slopes, between[: heads - lower]]).astype(np.float32)
