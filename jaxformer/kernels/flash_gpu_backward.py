"""The gradients of `jaxformer.kernels.flash_gpu`: one kernel by queries, one by keys.

Each makes the weights again from q, k and the log-sums. The first holds a block of
queries and walks over keys: it gives dq and the bias's gradient. The second holds a block
of keys and walks over the queries of all heads that share it: dk and dv are sums in a
fixed order, the same in every run.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxformer.kernels.arithmetic import LOG2E, multiply
from jaxformer.kernels.case import Case, Gradients, Side
from jaxformer.kernels.flash_gpu_tile import (
    CaseRefs,
    Parts,
    Places,
    Problem,
    bounds,
    load,
    load_head,
    logits,
    part,
    places,
    prepare,
    product,
    pull_back,
    store,
    store_head,
    visible,
    width,
)
from jaxformer.kernels.flash_gpu_walk import lists, walk, walk_unseen
from jaxformer.kernels.outputs import output
from jaxformer.kernels.tiles import gpu


class Rows(NamedTuple):
    """What the backward pass knows of each query.

    `d_out` `[B, T, N, H]`; `lse` and `delta` `[B, N, T]` float32: the log-sum, +inf where
    there is no key, and the sum of `out * d_out` less the gradient by the log-sum.
    """

    d_out: Array
    lse: Array
    delta: Array


def gradients(p: Problem, q, k, v, case: Case, rows: Rows, interpret: bool) -> Gradients:
    """All of them; the intervals of `case` are clipped."""
    d_q, d_bias, q_scale, q_shift = _by_queries(p, q, k, v, case, rows, interpret)
    d_k, d_v, k_scale, k_shift = _by_keys(p, q, k, v, case, rows, interpret)
    if case.bias is not None and case.learns_bias:
        over = [i for i in (0, 1) if case.bias.shape[i] == 1]
        d_bias = d_bias.sum(over, keepdims=True).astype(case.bias.dtype)
    weights = [
        x if x is None else x.sum((0, 1, 2)) for x in (q_scale, q_shift, k_scale, k_shift)
    ]
    return Gradients(d_q, d_k, d_v, d_bias, *weights)


def _by_queries(p: Problem, q, k, v, case: Case, rows: Rows, interpret: bool):
    """dq, the bias's gradient in every batch and head, and sums for the queries' norm."""
    size = gpu("queries", p.T, p.S, p.H, p.dtype, laden=p.laden)
    blocks = pl.cdiv(p.T, size.queries)
    out = {"rows": output(q.shape, q.dtype, q)}
    if case.bias is not None and case.learns_bias:
        whole = (p.B, p.N, p.T, p.S)
        dtype = case.bias.dtype if case.bias.shape == whole else jnp.float32
        out["bias"] = output(whole, dtype, q)
    out |= _norm_sums((p.B, p.N, blocks, p.H), case.q, q)
    out = pl.pallas_call(
        functools.partial(_queries_kernel, p, size),
        out_shape=out,
        grid=(blocks, p.N, p.B),
        compiler_params=triton.CompilerParams(size.warps, size.stages),
        interpret=interpret,
        name="attention_gradients_by_queries",
    )(q, k, v, CaseRefs.of(case), rows, lists(p, case, size))
    return out["rows"], *(out.get(name) for name in ("bias", "scale", "shift"))


def _by_keys(p: Problem, q, k, v, case: Case, rows: Rows, interpret: bool):
    """dk and dv, and sums for the keys' norm."""
    size = gpu("keys", p.T, p.S, p.H, p.dtype, laden=p.laden)
    blocks = pl.cdiv(p.S, size.keys)
    out = {"rows": output(k.shape, k.dtype, k), "v": output(v.shape, v.dtype, v)}
    out |= _norm_sums((p.B, p.K, blocks, p.H), case.k, k)
    out = pl.pallas_call(
        functools.partial(_keys_kernel, p, size),
        out_shape=out,
        grid=(blocks, p.K, p.B),
        compiler_params=triton.CompilerParams(size.warps, size.stages),
        interpret=interpret,
        name="attention_gradients_by_keys",
    )(q, k, v, CaseRefs.of(case), rows, lists(p, case, size, swap=True))
    return out["rows"], out["v"], *(out.get(name) for name in ("scale", "shift"))


def _norm_sums(shape, side: Side, like: Array) -> dict[str, jax.ShapeDtypeStruct]:
    """A program's own sums of the gradients of a norm's weights, where it has them."""
    names = [name for name in ("scale", "shift") if getattr(side, name) is not None]
    return {name: output(shape, jnp.float32, like) for name in names}


def _queries_kernel(p: Problem, size, q_ref, k_ref, v_ref, case: Case, rows: Rows, visits, out):
    """A block of queries of one head, against the keys that it sees."""
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    n, b = pl.program_id(1), pl.program_id(2)
    head = n // p.G
    t = places(block, size.queries, p.T, 0)
    q = prepare(p, load_head(p, q_ref, b, t, n), case.q, b, t)
    d_out = load_head(p, rows.d_out, b, t, n)
    lse, delta = _load_rows(rows, b, n, t)
    ends = bounds(case, b, t)

    def step(_, tile, masked, d_q):
        s, at = (places(tile, size.keys, p.S, axis) for axis in (1, 0))
        k = prepare(p, load_head(p, k_ref, b, at, head), case.k, b, at)
        y, slope = logits(product(q, k), case, b, n, t, s)
        if masked:
            y = jnp.where(visible(ends, s, p.S), y, -jnp.inf)
        d = jnp.exp2(y - lse)
        d *= product(d_out, load_head(p, v_ref, b, at, head)) - delta
        if "bias" in out:
            store(out["bias"], b, n, t, s, value=d)
        d = (d if slope is None else d * slope).astype(p.dtype)
        return [a + multiply(d, x, contract=0) for a, x in zip(d_q, k, strict=True)]

    whole, tiles = p.S // size.keys, pl.cdiv(p.S, size.keys)
    d_q = walk(step, _zeros(p, size.queries), visits, b, block, whole, tiles)
    if "bias" in out and visits is not None:

        def clear(tile):
            zeros = jnp.zeros((size.queries, size.keys), jnp.float32)
            store(out["bias"], b, n, t, places(tile, size.keys, p.S, 1), value=zeros)

        walk_unseen(clear, visits, b, block, tiles)
    _finish(p, out, d_q, q_ref, case.q, case.scale, b, t, n, block)


def _keys_kernel(p: Problem, size, q_ref, k_ref, v_ref, case: Case, rows: Rows, visits, out):
    """A block of keys of one head, against the queries that see it; tiles are `[S, T]`."""
    block, head, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    s = places(block, size.keys, p.S, 0)
    k = prepare(p, load_head(p, k_ref, b, s, head), case.k, b, s)
    v = load_head(p, v_ref, b, s, head)

    def step(group, tile, masked, carry):
        d_k, d_v = carry
        n = head * p.G + group
        t, at = (places(tile, size.queries, p.T, axis) for axis in (1, 0))
        q = prepare(p, load_head(p, q_ref, b, at, n), case.q, b, at)
        y, slope = logits(product(k, q), case, b, n, t, s)
        if masked:
            y = jnp.where(visible(bounds(case, b, t), s, p.S), y, -jnp.inf)
        lse, delta = _load_rows(rows, b, n, t)
        weights = jnp.exp2(y - lse)
        d_out = load_head(p, rows.d_out, b, at, n)
        d = weights * (product(v, d_out) - delta)
        d = (d if slope is None else d * slope).astype(p.dtype)
        weights = weights.astype(p.dtype)
        d_k = [a + multiply(d, x, contract=0) for a, x in zip(d_k, q, strict=True)]
        d_v = [a + multiply(weights, x, contract=0) for a, x in zip(d_v, d_out, strict=True)]
        return d_k, d_v

    # Without intervals there is no mask: keys past the last one change no other key's sum.
    tiles = pl.cdiv(p.T, size.queries)
    carry = _zeros(p, size.keys), _zeros(p, size.keys)
    d_k, d_v = walk(step, carry, visits, b, block, tiles, tiles, p.G)
    store_head(p, out["v"], b, s, head, d_v)
    if s.inside is not None:
        d_k = [jnp.where(s.inside, a, 0) for a in d_k]
    _finish(p, out, d_k, k_ref, case.k, case.scale, b, s, head, block)


def _finish(p: Problem, out, d: Parts, ref, side: Side, scale, b, rows: Places, n, block):
    """Goes back through scale, rotation and norm; writes what comes out."""
    d = [a * scale for a in d]
    x = load_head(p, ref, b, rows, n)
    d, sums = pull_back(p, d, x, side, b, rows)
    store_head(p, out["rows"], b, rows, n, d)
    for name in sums.keys() & out.keys():
        for columns, value in zip(p.cut, sums[name], strict=True):
            store(out[name], b, n, block, part(*columns), value=value)


def _load_rows(rows: Rows, b, n, t: Places):
    """The log-sums, in base 2, and delta; outside of the queries every weight will be 0."""
    lse = load(rows.lse, b, n, t, other=jnp.inf) * LOG2E
    return lse, load(rows.delta, b, n, t)


def _zeros(p: Problem, rows: int) -> Parts:
    return [jnp.zeros((rows, width(size)), jnp.float32) for _, size in p.cut]
