"""Flash attention for TPUs, backward: all gradients in one pass over the tiles.

The weights are made anew from the logits and the forward pass's logsumexp (Dao et al.
2022, arXiv 2205.14135, appendix B). Logits are transposed here too, `[keys, queries]`, so
that of the five products of a tile only the keys must be transposed, once. The gradients of
the keys grow in VMEM while the blocks of queries pass.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.kernels import cost, parts
from jaxformer.kernels import flash_tpu as forward
from jaxformer.kernels.arithmetic import LOG2E
from jaxformer.kernels.case import Case, Gradients, Side
from jaxformer.kernels.flash_tpu import LOW
from jaxformer.kernels.flash_tpu_tile import (
    as_they_lie,
    by_rows,
    clear_tail,
    keys_of,
    laid,
    lay,
    lay_apart,
    logits,
    one_or_many,
    prepared,
    read_side,
    sweep,
    window_of,
)
from jaxformer.kernels.outputs import output


def backward(
    q: Array,
    k: Array,
    v: Array,
    case: Case,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array | None = None,
    *,
    interpret=False,
) -> Gradients:
    """The gradients of attention, see `jaxformer.kernels.case`.

    Raises:
      NotImplementedError: as `flash_tpu.forward`.
    """
    forward.check(q, k, v, interpret)

    def run(case, part, before):
        found, rest = before or (None, None)
        # Later parts read what the first has made of the output, which is less.
        given = (out, lse, d_out, d_lse) if rest is None else (None, lse, d_out, rest)
        return _backward(q, k, v, case, part, found, *given, interpret=interpret)

    return parts.backward(run, case, forward.cut(q, k, case, interpret, backward=True))


def _backward(q, k, v, case, part, before, out, lse, d_out, d_lse, *, interpret):
    """The gradients, and the `d_lse` that has `out` in it too, where parts follow.

    What is taken from a query's logits' gradients is `sum(out * d_out) - d_lse`.
    """
    (B, T, N, H), K, some = q.shape, k.shape[2], part.shape(k)
    step = forward.make_step(
        q, some, case, backward=True, widen=bool(interpret), room=part.size
    )
    lanes = step.lanes
    groups = K // lanes.K
    arrays, specs = forward.inputs(q, k, v, case, part, step)
    stats = pl.BlockSpec((1, 1, lanes.N, step.tile.queries), lambda b, g, i: (b, g, 0, i))
    for name, x in (("out", out), ("d_out", d_out.astype(q.dtype))):
        if x is not None:
            arrays[name], specs[name] = forward.flat(x), specs["q"]
    for name, x in (("lse", lse), ("d_lse", d_lse)):
        if x is not None:
            arrays[name] = x.reshape(B, groups, lanes.N, T)
            specs[name] = stats
    like = {"q": arrays["q"], "k": arrays["k"], "v": arrays["v"]}
    out_shape = {n: output(x.shape, x.dtype, q) for n, x in like.items()}
    out_specs = {n: specs[n] for n in like}
    for name, side in (("q", case.q), ("k", case.k)):
        if side.scale is not None:
            shape = (B, groups, 2, lanes.width)
            out_shape[f"{name}_norm"] = output(shape, jnp.float32, q)
            out_specs[f"{name}_norm"] = pl.BlockSpec(
                (1, 1, 2, lanes.width), lambda b, g, i: (b, g, 0, 0)
            )
    if case.learns_bias:
        out_shape["bias"] = output((B, N, T, step.S), jnp.float32, q)
        out_specs["bias"] = pl.BlockSpec(
            (1, lanes.N, step.tile.queries, step.rows), lambda b, g, i: (b, g, i, 0)
        )
    if out is not None and part.where.stop < k.shape[1]:
        out_shape["delta"] = output((B, groups, lanes.N, T), jnp.float32, q)
        out_specs["delta"] = stats
    windows = lanes.laid(step.rows)
    apart = (lanes.N, step.tile.queries, lanes.span)
    scratch = {
        "kt": pltpu.VMEM((lanes.K, H, step.rows), k.dtype),
        "dk": pltpu.VMEM(windows, jnp.float32),
        "dv": pltpu.VMEM(windows, jnp.float32),
        "q": pltpu.VMEM(apart, q.dtype),
        "d_out": pltpu.VMEM(apart, q.dtype),
        "stats": pltpu.VMEM((lanes.N, 2, step.tile.queries), jnp.float32),
        "dqt": pltpu.VMEM((lanes.N * H, step.tile.queries), jnp.float32),
    }
    for name, side in (("k", case.k), ("v", Side())):
        if not as_they_lie(side, step):
            scratch[name] = pltpu.VMEM(windows, k.dtype)
    # Gradients of the parts before: of k and v they stay where they are.
    grown = {n: forward.flat(getattr(before, n)) for n in like} if before else {}
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    grown_specs = {n: specs["q"] if n == "q" else anywhere for n in grown}
    first, places = len(jax.tree.leaves(arrays)), sorted(out_shape)
    found = pl.pallas_call(
        functools.partial(_kernel, case=case, step=step),
        grid=(B, groups, step.blocks),
        in_specs=(specs, grown_specs),
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[scratch],
        compiler_params=forward.compiler_params(
            (arrays, grown, out_shape), (specs, grown_specs, out_specs), scratch.values()
        ),
        cost_estimate=cost.estimate(q, some, case, cost.BACKWARD, arrays, out_shape),
        input_output_aliases={first + n: places.index(x) for n, x in enumerate(sorted(grown))},
        interpret=interpret,
        name="flash_backward",
    )(arrays, grown)
    norms = {}
    for name, side in (("q", case.q), ("k", case.k)):
        if side.scale is not None:
            sums = found[f"{name}_norm"].sum((0, 1))[:, : lanes.heads * H]
            sums = sums.reshape(2, lanes.heads, H).sum(1)
            norms[f"{name}_scale"] = sums[0]
            norms[f"{name}_shift"] = None if side.shift is None else sums[1]
    gradients = Gradients(
        found["q"].reshape(q.shape),
        found["k"].reshape(k.shape),
        found["v"].reshape(v.shape),
        bias=_to_shape(found["bias"], case.bias) if case.learns_bias else None,
        **norms,
    )
    return gradients, -found["delta"].reshape(B, N, T) if "delta" in found else d_lse


def _to_shape(x: Array, like: Array) -> Array:
    """Sums over the axes along which `like` was repeated."""
    axes = tuple(a for a in range(2) if like.shape[a] < x.shape[a])
    return x.sum(axes, keepdims=True).astype(like.dtype)


def _kernel(refs, before, out, scr, *, case, step):
    lanes = step.lanes
    place = pl.program_id(1), pl.program_id(2)

    def at(block, do):
        do() if step.blocks == 1 else pl.when(place[1] == block)(do)

    at(0, lambda: _load_keys(refs, out, scr, case, step))
    if "bias" in out and step.masked:
        out["bias"][...] = jnp.zeros_like(out["bias"])  # Not every tile is visited.

    def scores(chain, tile, bounds):
        (head, first, count), (start, size) = chain, tile
        keys = pl.ds(start, size)
        q, g = (scr[n][head, pl.ds(first, count)] for n in ("q", "d_out"))
        k, v = (keys_of(refs, scr, n, head, keys, step) for n in ("k", "v"))
        found = logits(refs, q, k, place, head, first, start, case, step, bounds)
        return *found, step.multiply(v, g, contract=1)

    def absorb(dqt, chain, tile, s, seen, slope, dp):
        (head, first, count), (start, size) = chain, tile
        keys, queries = pl.ds(start, size), pl.ds(first, count)
        window = window_of(head, keys, step)
        lse, delta = (scr["stats"][head, n : n + 1, queries] for n in range(2))
        if seen is not None:
            s = jnp.where(seen, s, 3 * LOW)
        p = jnp.exp2(s - lse)
        ds = p * (dp - delta)
        if "bias" in out:
            out["bias"][0, head, queries, keys] = ds.T
        if slope is not None:
            ds *= slope
        p, ds = p.astype(scr["q"].dtype), ds.astype(scr["q"].dtype)
        scr["dv"][window] += step.multiply(p, scr["d_out"][head, queries], contract=0)
        scr["dk"][window] += step.multiply(ds, scr["q"][head, queries], contract=0)
        more = step.multiply(scr["kt"][lanes.key_head(head), :, keys], ds, contract=0)
        return more if dqt is None else dqt + more

    def start():
        return jnp.zeros((lanes.H, step.tile.chunk), jnp.float32)

    def finish(dqt, chain):
        head, first, count = chain
        rows = pl.ds(head * lanes.H, lanes.H)
        scr["dqt"][rows, pl.ds(first, count)] = dqt * case.scale

    def write(start, size):
        rows = pl.ds(start, size)
        dq = scr["dqt"][:, rows].T
        if not case.q.plain:
            rest = _rest(place[1], start, step)
            _unprepare(
                refs, before, out, "q", lanes.split(dq), case.q, lanes, start, size, rest
            )
            return
        if before:
            dq += before["q"][0, rows].astype(jnp.float32)
        out["q"][0, rows] = dq.astype(out["q"].dtype)

    def queries(alone):
        _load_queries(refs, out, scr, place[1], case, step)
        sweep(refs, step, start, scores, absorb, finish, alone=alone)
        by_rows(write, step.tile.queries, lanes.N, step)

    one_or_many(refs, step, queries)
    at(step.blocks - 1, lambda: _store(refs, out, scr, case, step))


def _rest(block, start, step):
    """How many rows from `start` in a block are queries; the others hold anything."""
    uneven = step.T % step.tile.queries > 0
    return step.T - block * step.tile.queries - start if uneven else None


def _load_keys(refs, out, scr, case, step):
    """Lays out keys and values, and clears what grows."""
    lanes, H = step.lanes, step.lanes.H

    def some(start, size):
        rows = pl.ds(start, size)
        windows = {"k": prepared(lanes, refs, "k", case.k, rows)}
        windows["v"] = lanes.split(refs["v"], rows)
        for name in windows:
            if name in scr:
                lay(lanes, windows[name], scr[name], rows)
        for u in range(step.windows):
            kt = keys_of(refs, scr, "k", u * lanes.heads * lanes.G, rows, step).T
            skip = u * H - lanes.first(u) if lanes.astride else 0
            for slot in range(lanes.heads):
                head = slice(skip + slot * H, skip + (slot + 1) * H)
                scr["kt"][u * lanes.heads + slot, :, rows] = kt[head]
        for name in ("dk", "dv"):
            scr[name][:, rows] = jnp.zeros_like(scr[name][:, rows])

    for name in ("k", "v", "dk", "dv"):
        if name in scr:
            clear_tail(scr[name], step, axis=1)
    clear_tail(scr["kt"], step, axis=2)
    by_rows(some, step.S, step.windows, step)
    for name in ("q_norm", "k_norm"):
        if name in out:
            out[name][...] = jnp.zeros_like(out[name])


def _load_queries(refs, out, scr, block, case, step):
    """Lays out q and d_out, and makes the rows `lse` (in base 2) and `delta` of each query."""
    lanes, H = step.lanes, step.lanes.H

    def some(start, size):
        rows, rest = pl.ds(start, size), _rest(block, start, step)
        lay_apart(lanes, prepared(lanes, refs, "q", case.q, rows), scr["q"], rows)
        g = refs["d_out"][0, rows]
        if rest is not None:
            row = lax.broadcasted_iota(jnp.int32, (size, 1), 0) < rest
            g = jnp.where(row, g, jnp.zeros_like(g))
            for h in range(lanes.N):
                q = scr["q"][h, rows]
                scr["q"][h, rows] = jnp.where(row, q, jnp.zeros_like(q))
        lay_apart(lanes, lanes.split(g), scr["d_out"], rows)
        lse = refs["lse"][0, 0, :, rows] * LOG2E
        seen = lse > -jnp.inf  # Rows with keys.
        lse = jnp.where(seen, lse, 0.0)
        delta = None
        if "out" in refs:
            delta = (g.astype(jnp.float32) * refs["out"][0, rows].astype(jnp.float32)).T
        for h in range(lanes.N):
            if delta is None:
                d = jnp.zeros((1, size), jnp.float32)
            else:
                d = delta[h * H : (h + 1) * H].sum(0, keepdims=True)
            if "d_lse" in refs:
                d -= jnp.where(seen[h : h + 1], refs["d_lse"][0, 0, h : h + 1, rows], 0.0)
            l = lse[h : h + 1]
            if rest is not None:
                column = lax.broadcasted_iota(jnp.int32, (1, size), 1) < rest
                d, l = jnp.where(column, d, 0.0), jnp.where(column, l, -LOW)
            scr["stats"][h, 0:1, rows], scr["stats"][h, 1:2, rows] = l, d
            if "delta" in out:
                out["delta"][0, 0, h : h + 1, rows] = d

    by_rows(some, step.tile.queries, lanes.N, step)


def _store(refs, out, scr, case, step):
    """Writes the gradients of keys and values, whole by now."""
    lanes = step.lanes

    def some(start, size):
        rows = pl.ds(start, size)
        windows = (x * case.scale for x in laid(lanes, scr["dk"], rows))
        if case.k.plain:
            lanes.store(out["k"], windows, rows)
        else:
            _unprepare(refs, {}, out, "k", windows, case.k, lanes, start, size, None)
        lanes.store(out["v"], laid(lanes, scr["dv"], rows), rows)

    by_rows(some, step.S, step.windows, step)


def _unprepare(refs, before, out, name, windows, side, lanes, start, size, rest):
    """Takes gradients back through rotation and norm, and sums those of its weights.

    Of `size` rows from `start`, of which the first `rest` count; None: all. Adds those that
    are there `before`.
    """
    rows, row = pl.ds(start, size), None
    read = read_side(refs["sides"][name], rows)
    if rest is not None:
        row = lax.broadcasted_iota(jnp.int32, (size, 1), 0) < rest
        angles = {n: jnp.where(row, x, 0.0) for n, x in read.items() if n in ("cos", "sin")}
        read |= angles

    def each():
        more = lanes.split(before[name], rows) if before else itertools.repeat(None)
        pairs = zip(windows, lanes.split(refs[name], rows), strict=True)
        for (g, x), y in zip(pairs, more, strict=False):
            x = x.astype(jnp.float32)
            if row is not None:
                x, g = jnp.where(row, x, 0.0), jnp.where(row, g, 0.0)
            g, d_scale, d_shift = lanes.unprepare(g, x, read, side)
            if side.scale is not None:
                out[f"{name}_norm"][0, 0, 0:1] += d_scale
                out[f"{name}_norm"][0, 0, 1:2] += d_shift
            yield g if y is None else g + y.astype(jnp.float32)

    lanes.store(out[name], each(), rows)
