"""Sets of keys as intervals `[start, stop)`, one for each query: how masks become data.

An interval is a pair of int32 arrays `[#B, T]`, or of plain numbers where every query has
the same: a start of 0 and a stop of S are kept plain, so that what needs no bound has
none. A set is a list of intervals; they may overlap, be empty or reach outside.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

Bound = int | Array
Interval = tuple[Bound, Bound]

# A kernel takes so many a query: every mask of this suite has them, most have one.
MOST = 2


# Farther than any token; the sum of two of it and a row's length is no overflow.
FAR = 2**29


def near(n: Bound) -> Bound:
    """A number of places, at most `FAR` of them either way."""
    return max(-FAR, min(n, FAR)) if isinstance(n, int) else jnp.clip(n, -FAR, FAR)


def is_all(interval: Interval, S: int) -> bool:
    """True where the interval is known to hold all `S` keys."""
    start, stop = interval
    return isinstance(start, int) and isinstance(stop, int) and start <= 0 and stop >= S


def both(a: Sequence[Interval], b: Sequence[Interval], S: int) -> list[Interval]:
    """The keys of either set that the other set has too."""
    kept = []
    for start, stop in a:
        for other_start, other_stop in b:
            first = _pick(jnp.maximum, start, other_start, 0)
            kept.append((first, _pick(jnp.minimum, stop, other_stop, S)))
    return kept


def either(a: Sequence[Interval], b: Sequence[Interval], S: int) -> list[Interval]:
    """The keys of one set or the other; intervals that begin, or end, alike become one."""
    whole = [i for i in (*a, *b) if is_all(i, S)]
    if whole:
        return whole[:1]
    found: list[Interval] = []
    for start, stop in (*a, *b):
        for n, (other_start, other_stop) in enumerate(found):
            if _plain(start, 0) and _plain(other_start, 0):
                found[n] = (0, _pick(jnp.maximum, stop, other_stop))
                break
            if _plain(stop, S) and _plain(other_stop, S):
                found[n] = (_pick(jnp.minimum, start, other_start), S)
                break
        else:
            found.append((start, stop))
    return found


def stack(found: Sequence[Interval], T: int) -> Int[Array, "#B n T"]:
    """Starts and stops below one another, as `kernels.case.Case` has them."""
    rows = [jnp.asarray(bound, jnp.int32) for interval in found for bound in interval]
    batch = max([1, *(row.shape[0] for row in rows if row.ndim == 2)])
    rows = [jnp.reshape(r, (1,) * (2 - r.ndim) + r.shape) for r in rows]
    return jnp.stack([jnp.broadcast_to(row, (batch, T)) for row in rows], axis=1)


def runs(ids: Int[Array, "B T"]) -> Interval:
    """Where the run of equal ids around each position starts and stops."""
    index = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    new = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(new, index, 0), axis=1)
    last = jnp.pad(new[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    far = ids.shape[1]
    stop = jax.lax.cummin(jnp.where(last, index + 1, far), axis=1, reverse=True)
    return start, stop


def lookup(q_ids: Int[Array, "B T"], k_ids: Int[Array, "B S"]) -> Interval:
    """Where the keys of each query's id start and stop; empty where there are none."""

    def row(q_ids, k_ids):
        order = jnp.argsort(k_ids)  # Stable: the first of an id comes first.
        k_ids = k_ids[order]
        first = jnp.searchsorted(k_ids, q_ids, side="left")
        count = jnp.searchsorted(k_ids, q_ids, side="right") - first
        start = order[jnp.minimum(first, k_ids.size - 1)]
        return start.astype(jnp.int32), (start + count).astype(jnp.int32)

    return jax.vmap(row)(*_alike(q_ids, k_ids))


def side_by_side(ids: np.ndarray) -> bool:
    """True where the tokens of every id but 0 stand side by side."""
    new = np.diff(ids, axis=1, prepend=0) != 0
    # An id that begins twice stands twice among the beginnings.
    begun = np.sort(np.where(new, ids, 0), axis=1)
    return not ((begun[:, 1:] == begun[:, :-1]) & (begun[:, 1:] != 0)).any()


def seen(intervals: Int[Array, "#B n T"], keys: Int[Array, " S"]) -> Array:
    """Which of the `keys` each query sees: bool `[#B, T, S]`."""
    keys = keys[None, None]

    def inside(n):
        return (keys >= intervals[:, n, :, None]) & (keys < intervals[:, n + 1, :, None])

    return inside(0) if intervals.shape[1] == 2 else inside(0) | inside(2)


def covered(intervals: Int[Array, "#B n T"], S: int) -> tuple[Array, Array]:
    """Which queries see a key, `[#B, T]`, and which keys are seen, `[#B, S]`; in O(T + S)."""
    start, stop = (jnp.clip(intervals[:, n::2], 0, S) for n in (0, 1))
    some = start < stop
    step = some.astype(jnp.int32)

    def row(start, stop, step):  # Each interval steps up at its start, down at its stop.
        steps = jnp.zeros(S + 1, jnp.int32).at[start].add(step).at[stop].add(-step)
        return jnp.cumsum(steps)[:S] > 0

    flat = (x.reshape(x.shape[0], -1) for x in (start, stop, step))
    return some.any(1), jax.vmap(row)(*flat)


def _plain(bound: Bound, value: int) -> bool:
    return isinstance(bound, int) and bound == value


def _pick(choose, a: Bound, b: Bound, idle: int | None = None) -> Bound:
    """The bound that binds; `idle` is a plain one that never does."""
    if idle is not None and (_plain(a, idle) or _plain(b, idle)):
        return b if _plain(a, idle) else a
    a, b = jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32)
    ndim = max(a.ndim, b.ndim)
    return choose(*(jnp.reshape(x, (1,) * (ndim - x.ndim) + x.shape) for x in (a, b)))


def _alike(*ids: Array) -> list[Array]:
    batch = max(x.shape[0] for x in ids)
    return [jnp.broadcast_to(x, (batch, x.shape[1])) for x in ids]
