"""How a Triton kernel goes over the tiles that it has to visit."""

import jax.numpy as jnp
from jax import lax

from jaxformer.kernels.case import Case
from jaxformer.kernels.flash_gpu_tile import Problem
from jaxformer.kernels.tiles import Gpu
from jaxformer.kernels.visits import Visits, kinds


def lists(p: Problem, case: Case, size: Gpu, *, swap: bool = False) -> Visits | None:
    """For each block of queries, with `swap` of keys; None: all see all."""
    if case.intervals is None:
        return None
    return Visits.of(kinds(case.intervals, p.S, size.queries, size.keys), swap=swap)


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
