"""What an attention kernel is given beside q, k and v, and the gradients it gives back.

Every implementation of attention, in Pallas or not, has this face:

    forward(q, k, v, case) -> out, lse
    backward(q, k, v, case, out, lse, d_out, d_lse) -> Gradients

with q `[B, T, N, H]`, k and v `[B, S, K, H]`, out like q, lse `[B, N, T]` in float32: the
log of the sum of the exponentials of a row's logits. Query head `n` shares key head
`n // (N // K)`. In order: q and k are normalised, then rotated; the logits are their
products times `scale`, capped, plus `bias`, plus ALiBi; keys outside `intervals` are left
out. A row without keys gives out = 0, lse = -inf and gradients of 0. What an
implementation cannot do raises `NotImplementedError` with the reason.
"""

import dataclasses

import jax
import numpy as np
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """What happens to the queries, or to the keys, before they meet.

    `scale` and `shift` `[H]` float32: the norm's weights; no scale, no norm. `cos` and
    `sin` `[1 or B, T, H / 2]` float32: pair `(i, i + H / 2)` is turned by that angle.
    `centered`: LayerNorm, which subtracts the mean; else RMSNorm.
    """

    scale: Array | None = None
    shift: Array | None = None
    cos: Array | None = None
    sin: Array | None = None
    centered: bool = dataclasses.field(default=False, metadata={"static": True})
    epsilon: float = dataclasses.field(default=1e-6, metadata={"static": True})

    @property
    def plain(self) -> bool:
        """True where nothing happens."""
        return self.scale is None and self.cos is None


class Known:
    """Intervals that are known before compiling: `[2 or 4, T]`, for every row of the batch.

    A kernel may be written for them. Equal ones are one key of a compilation cache.
    """

    def __init__(self, intervals: np.ndarray):
        self.intervals = np.asarray(intervals, np.int32)
        self._key = self.intervals.shape, self.intervals.tobytes()

    def __eq__(self, other):
        return isinstance(other, Known) and self._key == other._key

    def __hash__(self):
        return hash(self._key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem.

    `intervals` `[1 or B, 2 or 4, T]` int32: query `t` sees key `s` where
    `intervals[b, 0, t] <= s < intervals[b, 1, t]`, or so with rows 2 and 3; None: all
    keys. An interval may be empty, reach outside of the keys, or overlap the other.
    `known`: the same, where they are no data. `fixed_bias`: nobody asks for the bias's
    gradient, which is as large as all logits; kernels leave it out.
    `bias` `[1 or B, 1 or N, T, S]`: added to the logits. `slopes` `[N]` float32: ALiBi,
    the logits lose `slopes[n] * abs(t + offset - s)`. `scale`: of the products.
    `softcap`: `c * tanh(logits / c)` after the scale.
    """

    q: Side = Side()
    k: Side = Side()
    intervals: Array | None = None
    bias: Array | None = None
    slopes: Array | None = None
    offset: int = dataclasses.field(default=0, metadata={"static": True})
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    known: Known | None = dataclasses.field(default=None, metadata={"static": True})
    fixed_bias: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def learns_bias(self) -> bool:
        """Whether there is a bias that gets a gradient."""
        return self.bias is not None and not self.fixed_bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradients:
    """Of a loss by what may be learned; None where the case has no such thing to learn.

    `q`, `k`, `v` have the shape and dtype of their arrays; `bias` of `case.bias`; the
    weights of the norms `[H]` are float32.
    """

    q: Array
    k: Array
    v: Array
    bias: Array | None = None
    q_scale: Array | None = None
    q_shift: Array | None = None
    k_scale: Array | None = None
    k_shift: Array | None = None
