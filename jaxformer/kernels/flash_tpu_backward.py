"""Flash attention for TPUs, backward: all gradients in one pass over the tiles.

The weights are made anew from the logits and the forward pass's logsumexp (Dao et al.
2022, arXiv 2205.14135, appendix B). Logits are transposed here too, `[keys, queries]`, so
that of the five products of a tile only the keys must be transposed, once. The gradients of
the keys grow in VMEM while the blocks of queries pass.
"""

import functools

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
    lay_apart,
    logits,
    one_or_many,
    prepared,
    read_side,
    sweep,
)


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
    forward.check(q, interpret)
    run = functools.partial(_backward, interpret=interpret)
    cut = forward.cut(q, k, case, backward=True)
    return parts.backward(run, q, k, v, case, out, lse, d_out, d_lse, cut)


def _backward(q, k, v, case, out, lse, d_out, d_lse, *, interpret) -> Gradients:
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    step = forward.make_step(q, k, case, backward=True, widen=bool(interpret))
    lanes = step.lanes
    groups = K // lanes.K
    arrays, specs = forward.inputs(q, k, v, case, step)
    stats = pl.BlockSpec((1, 1, lanes.N, step.tile.queries), lambda b, g, i: (b, g, 0, i))
    arrays |= {"out": forward.flat(out), "d_out": forward.flat(d_out.astype(q.dtype))}
    specs |= {"out": specs["q"], "d_out": specs["q"]}
    for name, x in (("lse", lse), ("d_lse", d_lse)):
        if x is not None:
            arrays[name] = x.reshape(B, groups, lanes.N, T)
            specs[name] = stats
    like = {"q": arrays["q"], "k": arrays["k"], "v": arrays["v"]}
    out_shape = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in like.items()}
    out_specs = {n: specs[n] for n in like}
    for name, side in (("q", case.q), ("k", case.k)):
        if side.scale is not None:
            shape = (B, groups, 2, lanes.width)
            out_shape[f"{name}_norm"] = jax.ShapeDtypeStruct(shape, jnp.float32)
            out_specs[f"{name}_norm"] = pl.BlockSpec(
                (1, 1, 2, lanes.width), lambda b, g, i: (b, g, 0, 0)
            )
    if case.bias is not None:
        out_shape["bias"] = jax.ShapeDtypeStruct((B, N, T, S), jnp.float32)
        out_specs["bias"] = pl.BlockSpec(
            (1, lanes.N, step.tile.queries, step.rows), lambda b, g, i: (b, g, i, 0)
        )
    windows = (step.windows, step.rows, lanes.width)
    scratch = {
        "kt": pltpu.VMEM((lanes.K, H, step.rows), k.dtype),
        "dk": pltpu.VMEM(windows, jnp.float32),
        "dv": pltpu.VMEM(windows, jnp.float32),
        "q": pltpu.VMEM((lanes.N, step.tile.queries, lanes.width), q.dtype),
        "d_out": pltpu.VMEM((lanes.N, step.tile.queries, lanes.width), q.dtype),
        "stats": pltpu.VMEM((lanes.N, 2, step.tile.queries), jnp.float32),
        "dqt": pltpu.VMEM((lanes.N * H, step.tile.queries), jnp.float32),
    }
    for name, side in (("k", case.k), ("v", Side())):
        if not as_they_lie(side, step):
            scratch[name] = pltpu.VMEM(windows, k.dtype)
    found = pl.pallas_call(
        functools.partial(_kernel, case=case, step=step),
        grid=(B, groups, step.blocks),
        in_specs=(specs,),
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[scratch],
        compiler_params=forward.compiler_params(
            (arrays, out_shape), (specs, out_specs), scratch.values()
        ),
        cost_estimate=cost.estimate(q, k, case, cost.BACKWARD, arrays, out_shape),
        interpret=interpret,
        name="flash_backward",
    )(arrays)
    norms = {}
    for name, side in (("q", case.q), ("k", case.k)):
        if side.scale is not None:
            sums = found[f"{name}_norm"].sum((0, 1))[:, : lanes.heads * H]
            sums = sums.reshape(2, lanes.heads, H).sum(1)
            norms[f"{name}_scale"] = sums[0]
            norms[f"{name}_shift"] = None if side.shift is None else sums[1]
    return Gradients(
        found["q"].reshape(q.shape),
        found["k"].reshape(k.shape),
        found["v"].reshape(v.shape),
        bias=_to_shape(found["bias"], case.bias) if case.bias is not None else None,
        **norms,
    )


def _to_shape(x: Array, like: Array) -> Array:
    """Sums over the axes along which `like` was repeated."""
    axes = tuple(a for a in range(2) if like.shape[a] < x.shape[a])
    return x.sum(axes, keepdims=True).astype(like.dtype)


def _kernel(refs, out, scr, *, case, step):
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
        window, keys = lanes.window(head), pl.ds(start, size)
        queries = pl.ds(first, count)
        lse, delta = (scr["stats"][head, n : n + 1, queries] for n in range(2))
        if seen is not None:
            s = jnp.where(seen, s, 3 * LOW)
        p = jnp.exp2(s - lse)
        ds = p * (dp - delta)
        if case.bias is not None:
            out["bias"][0, head, queries, keys] = ds.T
        if slope is not None:
            ds *= slope
        p, ds = p.astype(scr["q"].dtype), ds.astype(scr["q"].dtype)
        scr["dv"][window, keys] += step.multiply(p, scr["d_out"][head, queries], contract=0)
        scr["dk"][window, keys] += step.multiply(ds, scr["q"][head, queries], contract=0)
        more = step.multiply(scr["kt"][lanes.key_head(head), :, keys], ds, contract=0)
        return more if dqt is None else dqt + more

    def start():
        return jnp.zeros((lanes.H, step.tile.chunk), jnp.float32)

    def finish(dqt, chain):
        head, first, count = chain
        rows = pl.ds(head * lanes.H, lanes.H)
        scr["dqt"][rows, pl.ds(first, count)] = dqt * case.scale

    def write(start, size):
        dq = scr["dqt"][:, pl.ds(start, size)].T
        if case.q.plain:
            out["q"][0, pl.ds(start, size)] = dq.astype(out["q"].dtype)
        else:
            rest = _rest(place[1], start, step)
            _unprepare(refs, out, "q", lanes.split(dq), case.q, lanes, start, size, rest)

    def queries(alone):
        _load_queries(refs, scr, place[1], case, step)
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
        windows["v"] = lanes.split(refs["v"].at[0, rows])
        for name in windows:
            for u, w in enumerate(windows[name] if name in scr else ()):
                scr[name][u, rows] = w
        for u in range(step.windows):
            kt = keys_of(refs, scr, "k", u * lanes.heads * lanes.G, rows, step).T
            for slot in range(lanes.heads):
                scr["kt"][u * lanes.heads + slot, :, rows] = kt[slot * H : (slot + 1) * H]
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


def _load_queries(refs, scr, block, case, step):
    """Lays out q and d_out, and makes the rows `lse` (in base 2) and `delta` of each query."""
    lanes, H = step.lanes, step.lanes.H

    def some(start, size):
        rows, rest = pl.ds(start, size), _rest(block, start, step)
        lay_apart(lanes, prepared(lanes, refs, "q", case.q, rows), scr["q"], rows)
        g, y = refs["d_out"][0, rows], refs["out"][0, rows]
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
        delta = (g.astype(jnp.float32) * y.astype(jnp.float32)).T
        for h in range(lanes.N):
            d = delta[h * H : (h + 1) * H].sum(0, keepdims=True)
            if "d_lse" in refs:
                d -= jnp.where(seen[h : h + 1], refs["d_lse"][0, 0, h : h + 1, rows], 0.0)
            l = lse[h : h + 1]
            if rest is not None:
                column = lax.broadcasted_iota(jnp.int32, (1, size), 1) < rest
                d, l = jnp.where(column, d, 0.0), jnp.where(column, l, -LOW)
            scr["stats"][h, 0:1, rows], scr["stats"][h, 1:2, rows] = l, d

    by_rows(some, step.tile.queries, lanes.N, step)


def _store(refs, out, scr, case, step):
    """Writes the gradients of keys and values, whole by now."""
    lanes = step.lanes

    def some(start, size):
        rows = pl.ds(start, size)
        windows = (scr["dk"][u, rows] * case.scale for u in range(step.windows))
        if case.k.plain:
            lanes.store(out["k"].at[0, rows], windows)
        else:
            _unprepare(refs, out, "k", windows, case.k, lanes, start, size, None)
        lanes.store(out["v"].at[0, rows], (scr["dv"][u, rows] for u in range(step.windows)))

    by_rows(some, step.S, step.windows, step)


def _unprepare(refs, out, name, windows, side, lanes, start, size, rest):
    """Takes gradients back through rotation and norm, and sums those of its weights.

    Of `size` rows from `start`, of which the first `rest` count; None: all.
    """
    rows, row = pl.ds(start, size), None
    read = read_side(refs["sides"][name], rows)
    if rest is not None:
        row = lax.broadcasted_iota(jnp.int32, (size, 1), 0) < rest
        angles = {n: jnp.where(row, x, 0.0) for n, x in read.items() if n in ("cos", "sin")}
        read |= angles

    def each():
        for g, x in zip(windows, lanes.split(refs[name].at[0, rows]), strict=True):
            x = x.astype(jnp.float32)
            if row is not None:
                x, g = jnp.where(row, x, 0.0), jnp.where(row, g, 0.0)
            g, d_scale, d_shift = lanes.unprepare(g, x, read, side)
            if side.scale is not None:
                out[f"{name}_norm"][0, 0, 0:1] += d_scale
                out[f"{name}_norm"][0, 0, 1:2] += d_shift
            yield g

    lanes.store(out[name].at[0, rows], each())
