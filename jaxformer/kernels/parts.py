"""Attention to a row of keys in parts, where a kernel cannot hold the whole row.

Each part is an attention of its own; their logsumexps say how much of each is in the whole.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxformer.kernels.case import Case, Gradients, Side


def cut(S: int, most: int) -> list[slice]:
    """`S` keys in parts of at most `most`, a multiple of 512 long but for the last."""
    count = -(-S // most)
    size = min(-(-S // count // 512) * 512, max(most, 512))
    return [slice(start, min(start + size, S)) for start in range(0, S, size)]


def forward(run: Callable, q, k, v, case: Case, parts: list[slice]) -> tuple[Array, Array]:
    """`run(q, k, v, case)` over the parts of the keys, as one."""
    if len(parts) == 1:
        return run(q, k, v, case)
    found = [run(q, k[:, part], v[:, part], of(case, part)) for part in parts]
    lse = functools.reduce(jnp.logaddexp, [total for _, total in found])
    shares = [_weight(total, lse) * out.astype(jnp.float32) for out, total in found]
    return functools.reduce(jnp.add, shares).astype(q.dtype), lse


def backward(
    run: Callable, q, k, v, case: Case, out, lse, d_out, d_lse, parts: list[slice]
) -> Gradients:
    """The gradients, from those of each part; the logsumexp is that of the whole."""
    if len(parts) == 1:
        return run(q, k, v, case, out, lse, d_out, d_lse)
    found = [
        run(q, k[:, part], v[:, part], of(case, part), out, lse, d_out, d_lse) for part in parts
    ]

    def total(name) -> Any:
        some = [getattr(g, name) for g in found]
        if some[0] is None:
            return None
        return functools.reduce(jnp.add, [x.astype(jnp.float32) for x in some])

    return Gradients(
        total("q").astype(q.dtype),
        jnp.concatenate([g.k for g in found], 1),
        jnp.concatenate([g.v for g in found], 1),
        None if case.bias is None else jnp.concatenate([g.bias for g in found], 3),
        *(total(name) for name in ("q_scale", "q_shift", "k_scale", "k_shift")),
    )


def of(case: Case, part: slice) -> Case:
    """The case of some of the keys."""
    return dataclasses.replace(
        case,
        k=_side(case.k, part),
        intervals=None if case.intervals is None else case.intervals - part.start,
        known=None,
        bias=None if case.bias is None else case.bias[..., part],
        offset=case.offset - part.start,
    )


def _side(side: Side, part: slice) -> Side:
    if side.cos is None or side.sin is None:
        return side
    return dataclasses.replace(side, cos=side.cos[:, part], sin=side.sin[:, part])


def _weight(lse: Array, both: Array) -> Array:
    """`[B, N, T]` -> `[B, T, N, 1]`; of a row without keys, 0."""
    weight = jnp.exp(lse - jnp.where(jnp.isneginf(both), 0.0, both))
    return weight.swapaxes(1, 2)[..., None]
