"""Which tiles of a masked attention have anything to compute.

Where the intervals are data, lists that a kernel walks: other intervals are no other
program. Where they are known, spans of keys for which a kernel is written.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

AT_ONCE = 2**22  # Bounds of queries that are held against tiles of keys together.


class Visits(NamedTuple):
    """For each block of one side, the tiles of the other side.

    `order` `[1 or B, blocks, tiles]` int32: first the tiles of which all is seen, then
    those of which some is, then the others. `counts` `[1 or B, blocks, 2]` int32: how many
    are wholly seen, and how many are seen at all.
    """

    order: Array
    counts: Array

    @classmethod
    def of(cls, kind: Array, *, swap: bool = False) -> "Visits":
        """From what `kinds` says; with `swap` for each tile of keys, the blocks of queries."""
        kind = kind.swapaxes(1, 2) if swap else kind
        tiles = kind.shape[-1]
        # The kind leads and the tile's number follows: one sort, of one array.
        keys = kind * tiles + jnp.arange(tiles, dtype=jnp.int32)[(None,) * 2]
        order = jnp.sort(keys, axis=-1) % tiles
        counts = jnp.stack([(kind < 1).sum(-1), (kind < 2).sum(-1)], -1)
        return cls(order, counts.astype(jnp.int32))


def clip(intervals: Array, S: int) -> Array:
    """Intervals inside of the keys; no stop lies before its start."""
    start = jnp.clip(intervals[:, ::2], 0, S)
    stop = jnp.clip(intervals[:, 1::2], start, S)
    return jnp.stack([start, stop], 2).reshape(intervals.shape).astype(jnp.int32)


def kinds(intervals: Array, S: int, bq: int, bk: int) -> Array:
    """`[1 or B, T / bq, S / bk]`: what `bq` queries together see of `bk` keys.

    0 all, 1 some, 2 nothing, of intervals that are clipped; a tile that reaches over the
    last key is never seen whole.
    """
    b, n, T = intervals.shape
    blocks = -(-T // bq)
    rows = jnp.pad(intervals, ((0, 0), (0, 0), (0, blocks * bq - T)), mode="edge")
    rows = jnp.moveaxis(rows.reshape(b, n // 2, 2, blocks, bq, 1), 3, 0)
    first = jnp.arange(0, S, bk, dtype=jnp.int32)[(None,) * 3]
    last = first + bk

    def block(rows):
        start, stop = rows[:, :, 0], rows[:, :, 1]
        some = jnp.maximum(start, first) < jnp.minimum(stop, last)
        whole = ((start <= first) & (stop >= last)).any(1)
        if n == 4:
            for a, c in ((0, 1), (1, 0)):  # One interval begins where the other ends.
                joined = (start[:, a] <= first[:, 0]) & (stop[:, a] >= start[:, c])
                whole |= joined & (stop[:, c] >= last[:, 0])
        return jnp.where(whole.all(1), 0, jnp.where(some.any((1, 2)), 1, 2)).astype(jnp.int32)

    # All queries by all tiles are more than a long row's attention takes itself.
    few = max(1, AT_ONCE // (rows[0].size * first.size))
    return jnp.moveaxis(jax.lax.map(block, rows, batch_size=min(few, blocks)), 0, 1)


# The keys each chunk of queries sees: (start, size, what, some). `what` is the number of the
# pattern by which its queries see them, or None, where all see all. `some` are the queries of
# the chunk that see any of them, the first and how many.
Some = tuple[int, int]
Spans = tuple[tuple[tuple[int, int, int | None, Some], ...], ...]


def spans(
    intervals: np.ndarray, S: int, chunk: int, most: int, grain: int = 128
) -> tuple[Spans, list[np.ndarray]]:
    """The spans of known intervals, `[2 or 4, T]`, each of at most `most` keys; the patterns.

    They begin and end at multiples of `grain`, but for the last, and so do their queries.
    A pattern is boolean `[keys, queries]`: who sees whom.
    """
    numbers: dict[tuple, int] = {}
    patterns: list[np.ndarray] = []
    found = []
    for first in range(0, intervals.shape[1], chunk):
        rows = intervals[:, first : first + chunk]
        starts, stops, keys = rows[0::2, :, None], rows[1::2, :, None], np.arange(S)
        seen = np.asarray(((keys >= starts) & (keys < stops)).any(0))
        pieces = []
        for start, size, whole, some in _spans(seen, chunk, most, grain):
            what = None
            if not whole:
                pattern = seen[some[0] : sum(some), start : start + size].T
                name = (pattern.shape, pattern.tobytes())
                if name not in numbers:
                    patterns.append(pattern)
                what = numbers.setdefault(name, len(numbers))
            pieces.append((start, size, what, some))
        found.append(tuple(pieces))
    return tuple(found), patterns


def _spans(seen: np.ndarray, chunk: int, most: int, grain: int):
    """Joins neighbours that the same queries see, wholly or not."""
    S = seen.shape[1]
    start, cuts = 0, [*range(0, S, grain), S]
    kinds = [_kind(seen[:, a:b], chunk, grain) for a, b in itertools.pairwise(cuts)]
    for n, (kind, stop) in enumerate(zip(kinds, cuts[1:], strict=True)):
        if stop == S or kinds[n + 1] != kind or stop - start >= most:
            if kind is not None:
                yield start, stop - start, *kind
            start = stop


def _kind(seen: np.ndarray, chunk: int, grain: int) -> tuple[bool, Some] | None:
    """Whether the queries that see any of some keys see all, and which; None: no one does."""
    groups = [n for n in range(0, len(seen), grain) if seen[n : n + grain].any()]
    if not groups:
        return None
    start, stop = groups[0], min(chunk, groups[-1] + grain)
    return bool(seen[start:stop].all()), (start, stop - start)
