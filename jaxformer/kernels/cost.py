"""What a kernel tells the compiler of its cost, which schedules by it and plans with it."""

import math

import jax
from jax.experimental import pallas as pl

from jaxformer.kernels.case import Case

FORWARD, BACKWARD = 2, 5  # products of a tile of queries with one of keys.


def estimate(q, k, case: Case, products: int, arrays, outputs) -> pl.CostEstimate:
    """Of attention: `products` for each query and key that meet, every array once.

    Args:
      q: `[B, T, N, H]`.
      k: `[B, S, K, H]`.
      case: where its intervals are data, half of all pairs are taken to meet.
      products: FORWARD or BACKWARD.
      arrays: what the kernel reads.
      outputs: what it writes.
    """
    (B, T, N, H), S = q.shape, k.shape[1]
    pairs = T * S
    if case.known is not None:
        # Rows are starts and stops of one range, or of two.
        known = case.known.intervals.clip(0, S)
        pairs = sum(
            int((stop - start).clip(0).sum())
            for start, stop in zip(known[::2], known[1::2], strict=True)
        )
    elif case.intervals is not None:
        pairs //= 2
    leaves = jax.tree.leaves((arrays, outputs))
    return pl.CostEstimate(
        flops=2 * products * B * N * H * pairs,
        transcendentals=B * N * pairs,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves),
    )
