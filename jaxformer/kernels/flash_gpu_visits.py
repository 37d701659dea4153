"""Which tiles of a masked attention have anything to compute: lists that a kernel walks."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxformer.kernels.flash_gpu_tile import Problem


class Visits(NamedTuple):
    """For each block of one side, the tiles of the other side.

    `order` `[1 or B, blocks, tiles]` int32: first the tiles of which all is seen, then
    those of which some is, then the others. `counts` `[1 or B, blocks, 2]` int32: how many
    are wholly seen, and how many are seen at all.
    """

    order: Array
    counts: Array

    @classmethod
    def of(cls, kind: Array | None, *, swap: bool = False) -> "Visits | None":
        """From what `kinds` says; with `swap` for each tile of keys, the blocks of queries."""
        if kind is None:
            return None
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


def kinds(intervals: Array | None, p: Problem, bq: int, bk: int) -> Array | None:
    """`[1 or B, T / bq, S / bk]`: what the queries of a block see of a tile of keys.

    0 all, 1 some, 2 nothing, of intervals that are clipped; a tile that reaches over the
    last key is never seen whole. It may say "some" where each of two intervals covers a
    piece, or where the intervals of the rows lie on both sides of the tile.
    """
    if intervals is None:
        return None
    b, n, T = intervals.shape
    blocks = -(-T // bq)
    rows = jnp.pad(intervals, ((0, 0), (0, 0), (0, blocks * bq - T)), mode="edge")
    rows = rows.reshape(b, n // 2, 2, blocks, bq, 1)
    start, stop = rows[:, :, 0], rows[:, :, 1]
    first = jnp.arange(0, p.S, bk, dtype=jnp.int32)[(None,) * 3]
    whole = (start.max(3) <= first) & (stop.min(3) >= first + bk)
    live = start < stop
    begin = jnp.where(live, start, p.S).min(3)
    end = jnp.where(live, stop, 0).max(3)
    some = (begin < first + bk) & (end > first)
    return jnp.where(whole.any(1), 0, jnp.where(some.any(1), 1, 2)).astype(jnp.int32)


def walk(step, carry, visits: Visits | None, b, block, whole, tiles, groups=1):
    """Takes `step(group, tile, masked, carry)` over what a block has to visit.

    Without a list these are all `tiles`, of which the first `whole` need no mask. Each of
    the `groups` takes all of them: one loop and not two, because Triton overlaps reading
    with computing within a loop.
    """
    if visits is not None:
        b = 0 if visits.counts.shape[0] == 1 else b
        whole, tiles = visits.counts[b, block, 0], visits.counts[b, block, 1]

    def loop(begin, end, masked, carry):
        def body(i, carry):
            group, i = (0, i) if groups == 1 else (lax.div(i, size), lax.rem(i, size))
            tile = begin + i if visits is None else visits.order[b, block, begin + i]
            return step(group, tile, masked, carry)

        size = end - begin
        return lax.fori_loop(0, groups * size, body, carry)

    carry = loop(0, whole, False, carry)
    if visits is None:
        if whole == tiles:
            return carry
        # A bound that Triton does not know: written out straight, the tail's registers spill.
        tiles = tiles + jnp.minimum(block, 0)
    return loop(whole, tiles, True, carry)


def walk_unseen(step, visits: Visits, b, block, tiles: int):
    """Takes `step(tile)` over what a block does not visit."""
    b = 0 if visits.counts.shape[0] == 1 else b
    begin = visits.counts[b, block, 1]
    lax.fori_loop(begin, tiles, lambda i, _: step(visits.order[b, block, i]), None)
