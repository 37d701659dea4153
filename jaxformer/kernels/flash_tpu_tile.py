"""Tiles of attention inside of a TPU kernel: read, prepare, score, and who comes when."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jaxformer.kernels.arithmetic import LOG2E
from jaxformer.kernels.lanes import LANES


def by_rows(do, total, windows, step):
    """`do(start, size)` over the rows of some windows: at once, or a part after the other."""
    size, most = total, step.tile.written
    if total * windows > most:
        size = min(total, max(LANES, most // windows // LANES * LANES))
    loops, rest = divmod(total, size)
    if loops == 1:
        do(0, size)
    else:
        lax.fori_loop(0, loops, lambda n, _: do(pl.multiple_of(n * size, size), size) or _, 0)
    if rest:
        do(loops * size, rest)


def read_side(refs, rows) -> dict[str, Array]:
    """The weights and angles of one side, out of their blocks."""
    return {name: ref[0, rows] if ref.ndim == 3 else ref[...] for name, ref in refs.items()}


def prepared(lanes, refs, name, side, rows):
    """Windows of some queries or keys one by one, normalised and rotated in float32."""
    read = read_side(refs["sides"][name], rows)
    for w in lanes.split(refs[name], rows):
        if side.plain:
            yield w
        else:
            yield lanes.prepare(w.astype(jnp.float32), read, side).astype(w.dtype)


def as_they_lie(side, step) -> bool:
    """True where a block of keys holds its windows as products take them."""
    lanes = step.lanes
    even = lanes.astride or lanes.heads * lanes.H == lanes.width
    return side.plain and even and step.rows == step.S


def keys_of(refs, scr, name, head, rows, step) -> Array:
    """Rows of the window of keys that a query head sees, of scratch or as they lie."""
    if name in scr:
        return scr[name][window_of(head, rows, step)]
    lanes = step.lanes
    if lanes.astride:
        return refs[name][window_of(head, rows, step)]
    first = lanes.window(head) * lanes.width
    first = first if isinstance(first, int) else pl.multiple_of(first, LANES)
    return refs[name][0, rows, pl.ds(first, lanes.width)]


def window_of(head, rows, step) -> tuple:
    """Where in scratch those rows of a query head's keys lie that a product takes."""
    lanes = step.lanes
    if lanes.astride:
        return 0, rows, pl.ds(lanes.first(lanes.key_head(head)), lanes.span)
    return lanes.window(head), rows


def lay(lanes, windows, scr, rows):
    """Lays windows of some rows of keys into scratch."""
    if lanes.astride:
        lanes.store(scr, windows, rows)
        return
    for u, w in enumerate(windows):
        scr[u, rows] = w


def laid(lanes, scr, rows):
    """The windows of some rows in scratch, one by one."""
    if lanes.astride:
        yield from lanes.split(scr, rows)
    else:
        for u in range(scr.shape[0]):
            yield scr[u, rows]


def lay_apart(lanes, windows, scr, rows):
    """Lays windows of queries into scratch: one a head, the others' lanes 0."""
    for u, w in enumerate(windows):
        for h in range(u * lanes.heads, (u + 1) * lanes.heads):
            scr[h, rows] = lanes.only(w, h)


def clear_tail(scr, step, *, axis):
    """Makes 0 what lies where there is no key, in rows (axis 1) or lanes (axis 2)."""
    if step.rows > step.S:
        grain = (16, LANES)[axis - 1]
        tail = (slice(None),) * axis + (slice(step.S // grain * grain, None),)
        scr[tail] = jnp.zeros_like(scr[tail])


def logits(refs, q, k, place, head, first, start, case, step, bounds):
    """Logits in base 2, `[keys, queries]`, who sees whom, and the slope of the soft-cap.

    `place`: the group of heads and the block of queries. `head` counts in the step,
    `first` and `start` are the first query and key. `bounds`: the rows of the intervals
    that hold some query back, or the number of a pattern that is known.
    """
    # In float32: it would round q another time, and logits by 2^-9.
    factor = case.scale / case.softcap if case.softcap else case.scale * LOG2E
    s, slope = step.multiply(k, q, contract=1) * factor, None
    if case.softcap:
        t = jnp.tanh(s)
        s, slope = t * (case.softcap * LOG2E), 1 - jnp.square(t)
    if case.bias is not None:
        n = head if refs["bias"].shape[1] > 1 else 0
        bias = refs["bias"][0, n, pl.ds(first, q.shape[0]), pl.ds(start, k.shape[0])]
        bias = bias.astype(jnp.float32).T * LOG2E
        if step.T % step.tile.queries:  # Beyond the queries lies anything, and NaN stays.
            before = place[1] * step.tile.queries + first
            query = before + lax.broadcasted_iota(jnp.int32, (1, q.shape[0]), 1)
            bias = jnp.where(query < step.T, bias, 0.0)
        s += bias
    index = lax.broadcasted_iota(jnp.int32, s.shape, 0)
    if case.slopes is not None:
        group, block = place
        steep = refs["slopes"][group * step.lanes.N + head] * LOG2E
        before = block * step.tile.queries + first + case.offset
        query = before + lax.broadcasted_iota(jnp.int32, s.shape, 1)
        s -= steep * jnp.abs(query - (start + index)).astype(jnp.float32)
    if isinstance(bounds, int):
        unseen = refs["unseen"][bounds, : s.shape[0], : s.shape[1]]
        if case.bias is not None:  # Which may be anything where no one looks.
            return jnp.where(unseen < 0, unseen, s), None, slope
        return s + unseen, None, slope
    if not bounds:
        return s, None, slope
    rows, seen = refs["intervals"][0, :, pl.ds(first, q.shape[0])] - start, []
    for n in range(0, rows.shape[0], 2):
        inside = []
        if n in bounds:
            inside.append(index >= rows[n : n + 1])
        if n + 1 in bounds:
            inside.append(index < rows[n + 1 : n + 2])
        if inside:
            seen.append(functools.reduce(jnp.logical_and, inside))
    seen = functools.reduce(jnp.logical_or, seen)
    return s, seen & (index < step.S - start) if step.rows > step.S else seen, slope


def one_or_many(refs, step, do):
    """`do(alone)`, written twice where a list tells what is seen.

    Once for a block that sees one entry of the list, and all of it (an image among packed
    ones): what comes before and after is then no loop's and goes on beside its products.
    """
    if not step.listed:
        return do(False)
    whole, some = (refs["visits"][0, 0, 0, n] for n in range(2))
    alone = jnp.logical_and(whole == 1, some == 1)
    pl.when(alone)(lambda: do(True))
    pl.when(jnp.logical_not(alone))(lambda: do(False))


def sweep(refs, step, start, scores, absorb, finish, *, alone):
    """Every head and chunk of queries over the tiles it sees; `alone`: one entry of a list.

    Some (head, chunk) chains go side by side, since a chain alone waits for itself:
    `scores` of the next ones are asked for before those at hand are absorbed.
    """
    ahead, keys, whole = step.tile.ahead, step.tile.keys, (0, step.tile.chunk)
    chunks = range(0, step.tile.queries, step.tile.chunk)
    side = max(1, step.tile.chains // len(chunks))
    side = max(n for n in range(1, min(side, step.lanes.N) + 1) if step.lanes.N % n == 0)

    def visit(states, chains, spans):
        """Takes each chain over its own `spans`; a state is None until it has met a tile."""
        rounds = itertools.zip_longest(*spans)
        items = [(n, at) for some in rounds for n, at in enumerate(some) if at is not None]
        ready = []
        for at in range(len(items) + ahead):
            if at < len(items):
                n, (tile, bounds, some) = items[at]
                ready.append(scores(part(chains[n], some), tile, bounds))
            if at >= ahead:
                n, (tile, _, some) = items[at - ahead]
                states[n] = add(states[n], part(chains[n], some), tile, some, ready.pop(0))
        return states

    def part(chain, some):
        (head, chunk, _), (first, count) = chain, some
        return head, chunk + first, count

    def add(state, chain, tile, some, found):
        if some == whole:
            return absorb(state, chain, tile, *found)
        here = slice(some[0], sum(some))
        old = None if state is None else jax.tree.map(lambda x: x[:, here], state)
        new = absorb(old, chain, tile, *found)

        def put(x, y):
            parts = x[:, : here.start], y, x[:, here.stop :]
            return jnp.concatenate([p for p in parts if p.shape[1]], 1)

        return jax.tree.map(put, start() if state is None else state, new)

    def heads(first):
        chains = [(first + h, c, step.tile.chunk) for h in range(side) for c in chunks]
        see = listed if step.listed else every if step.spans is None else known
        for state, chain in zip(see(chains), chains, strict=True):
            finish(start() if state is None else state, chain)

    def known(chains):
        def tiles(pieces):
            for start, size, what, some in pieces:
                yield (start, size), () if what is None else what, some

        spans = [list(tiles(step.spans[c // n])) for _, c, n in chains]
        return visit([None] * len(chains), chains, spans)

    def every(chains):
        spans = [((s, min(keys, step.S - s)), (), whole) for s in range(0, step.S, keys)]
        many = max(1, step.tile.unrolled // len(chains))
        loops = step.S // keys // many if len(spans) > many else 0

        def body(n, states):
            base = pl.multiple_of(n * (many * keys), keys)
            spans = [((base + m * keys, keys), (), whole) for m in range(many)]
            return visit(list(states), chains, [spans] * len(chains))

        states = [None] * len(chains)
        if loops:
            states = [start() for _ in chains]
            states = lax.fori_loop(0, loops, body, states)
        return visit(list(states), chains, [spans[loops * many :]] * len(chains))

    def listed(chains):
        ref, size = refs["visits"], step.tile.listed

        def body(bounds, n, states):
            first = pl.multiple_of(ref[0, 0, 0, 2 + n] * size, size)
            tiles = [((first + at, keys), bounds, whole) for at in range(0, size, keys)]
            return visit(list(states), chains, [tiles] * len(chains))

        if alone:
            return body((), 0, [None] * len(chains))
        full, total = ref[0, 0, 0, 0], ref[0, 0, 0, 1]
        states = [start() for _ in chains]
        every_bound = tuple(range(refs["intervals"].shape[1]))
        states = lax.fori_loop(0, full, functools.partial(body, ()), states)
        return lax.fori_loop(full, total, functools.partial(body, every_bound), states)

    groups = step.lanes.N // side
    tiles_each = len(chunks) * side * pl.cdiv(step.tile.listed if alone else step.S, keys)
    if groups == 1 or groups * tiles_each <= step.tile.unrolled:
        for n in range(groups):
            heads(n * side)
    else:
        lax.fori_loop(0, groups, lambda n, _: heads(n * side) or _, 0)
