"""Attention to a row of keys in parts, where a kernel cannot hold the whole row.

Each part is an attention of its own; their logsumexps say how much of each is in the whole.
A kernel is handed all keys and the part that it is to read, so that none is copied.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxformer.kernels.case import Case, Gradients, Side

GRAIN = 512  # Keys, of which all parts but the last are a multiple.


class Part(NamedTuple):
    """`keys` of them, in the block `number` of those of `size` that the row is cut into."""

    number: int
    size: int
    keys: int

    @property
    def where(self) -> slice:
        """Where they lie."""
        return slice(self.number * self.size, self.number * self.size + self.keys)

    def shape(self, k: Array) -> jax.ShapeDtypeStruct:
        """That of `k` if it held these keys alone."""
        return jax.ShapeDtypeStruct((k.shape[0], self.keys, *k.shape[2:]), k.dtype)


def cut(S: int, most: int) -> list[Part]:
    """`S` keys in parts of at most `most`, a multiple of `GRAIN` long but for the last."""
    count = -(-S // most)
    size = S if count == 1 else min(-(-S // count // GRAIN) * GRAIN, max(most, GRAIN))
    return [Part(n, size, min(size, S - n * size)) for n in range(-(-S // size))]


def forward(run: Callable, q, k, v, case: Case, parts: list[Part]) -> tuple[Array, Array]:
    """`run(q, k, v, case, part)` over the parts of the keys, as one."""
    if len(parts) == 1:
        return run(q, k, v, case, parts[0])
    found = [run(q, k, v, of(case, part.where), part) for part in parts]
    lse = functools.reduce(jnp.logaddexp, [total for _, total in found])
    shares = [_weight(total, lse) * out.astype(jnp.float32) for out, total in found]
    return functools.reduce(jnp.add, shares).astype(q.dtype), lse


def backward(run: Callable, case: Case, parts: list[Part]) -> Gradients:
    """The gradients by `run(case, part, before)` over the parts; logsumexps are the whole's.

    `run` gives gradients and what else it hands on; `before` are those of the part before,
    None at first. The gradients by q are of all parts by then, those by k and v have all
    that were found, and the rest is of the part alone.
    """
    if len(parts) == 1:
        return run(case, parts[0], None)[0]
    found, before = [], None
    for part in parts:
        before = run(of(case, part.where), part, before)
        found.append(before[0])

    def total(name) -> Any:
        some = [getattr(g, name) for g in found]
        return None if some[0] is None else functools.reduce(jnp.add, some)

    return Gradients(
        found[-1].q,
        found[-1].k,
        found[-1].v,
        None if not case.learns_bias else jnp.concatenate([g.bias for g in found], 3),
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
