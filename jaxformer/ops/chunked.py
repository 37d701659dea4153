"""Attention in XLA some queries at a time: memory grows with T, not with T * S."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxformer.kernels.case import Case, Gradients
from jaxformer.ops import dense
from jaxformer.ops.dense import Out
from jaxformer.ops.mask import Mask

# So many logits a head are alive at a time.
LOGITS = 256 * 1024


def forward(q, k, v, case: Case, mask: Mask | None = None) -> Out:
    """As `dense.forward`, about `LOGITS` logits a head at a time."""
    (B, T, N, H), S = q.shape, k.shape[1]
    count = math.ceil(T / min(T, max(1, LOGITS // S)))
    size = math.ceil(T / count)
    q, k = dense.prepare(case.q, q), dense.prepare(case.k, k)

    def chunks(x, axis):
        """Moves chunks of the queries, at `axis`, to the front."""
        if x is None:
            return None
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, count * size - T)
        x = jnp.pad(x, pad)
        return jnp.moveaxis(
            x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0
        )

    # Not kept for the gradient, but made again: that is what saves the memory.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(k, v, q, index, bias, intervals):
        k, v = k.astype(dtypes[0]), v.astype(dtypes[1])
        part = dataclasses.replace(case, bias=bias, intervals=intervals)
        return dense.rows(q, index, k, v, part, mask, T)

    # Their gradients are sums over the chunks, in the dtype that the chunks are handed.
    dtypes = k.dtype, v.dtype
    k, v = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (k, v))

    def step(_, x):
        return _, chunk(k, v, *x)

    index = jnp.minimum(jnp.arange(count * size), T - 1).reshape(count, size)
    parts = (chunks(q, 1), index, chunks(case.bias, 2), chunks(case.intervals, 2))
    _, (out, lse) = jax.lax.scan(step, None, parts)
    out = jnp.moveaxis(out, 0, 1).reshape(B, count * size, N, H)
    lse = jnp.moveaxis(lse, 0, 2).reshape(B, N, count * size)
    return out[:, :T], lse[:, :, :T]


def backward(q, k, v, case, out, lse, d_out, d_lse=None, mask=None) -> Gradients:
    """What JAX makes of `forward`; `out` and `lse` are computed anew, chunk by chunk."""
    return dense.differentiate(forward, q, k, v, case, d_out, d_lse, mask)
