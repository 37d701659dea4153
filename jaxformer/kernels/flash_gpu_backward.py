"""The gradients of `jaxformer.kernels.flash_gpu`: one kernel by queries, one by keys.

Each makes the weights again from q, k and the log-sums. The first holds a block of
queries and walks over keys: it gives dq and the bias's gradient. The second holds a block
of keys and walks over the queries of all heads that share it: dk and dv are sums in a
fixed order, the same in every run.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxformer.kernels.case import Case, Gradients
from jaxformer.kernels.flash_gpu_tile import (
    LOG2E,
    Parts,
    Places,
    Problem,
    bounds,
    load,
    load_head,
    logits,
    multiply,
    part,
    places,
    prepare,
    product,
    pull_back,
    store,
    store_head,
    visible,
    width,
)
from jaxformer.kernels.flash_gpu_visits import Visits, kinds, walk
from jaxformer.kernels.tiles import gpu


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What the backward pass knows of each query.

    `d_out` `[B, T, N, H]`; `lse` and `delta` `[B, N, T]` float32: the log-sum, +inf where
    there is no key, and the sum of `out * d_out` less the gradient by the log-sum.
    """

    d_out: Array
    lse: Array
    delta: Array


def gradients(p: Problem, q, k, v, case: Case, rows: Rows, interpret: bool) -> Gradients:
    """All of them; the intervals of `case` are clipped."""
    d_q, d_bias, q_scale, q_shift = _by_queries(p, q, k, v, case, rows, interpret)
    d_k, d_v, k_scale, k_shift = _by_keys(p, q, k, v, case, rows, interpret)
    if d_bias is not None:
        over = [i for i in (0, 1) if case.bias.shape[i] == 1]
        d_bias = d_bias.sum(over, keepdims=True).astype(case.bias.dtype)
    weights = [x if x is None else x.sum((0, 1, 2)) for x in (q_scale, q_shift, k_scale, k_shift)]
    return Gradients(d_q, d_k, d_v, d_bias, *weights)
