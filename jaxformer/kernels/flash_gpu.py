"""Flash attention for NVIDIA GPUs, in Triton through Pallas: Ampere and everything since.

`forward` and `backward` with the face that `jaxformer.kernels.case` describes. No more
than a row of tiles is in fast memory at a time, so the memory is linear in T and S.
Norm and rotary of queries and keys happen on the tiles, forward and backward: what lies
in memory are q, k, v, out and the log-sums. Tiles that no query sees are not visited, and
tiles that all queries see have no mask; which is which is data, so that other lengths of
documents in an array of the same shape are no other program.

Sources: FlashAttention-2, Dao 2023, arXiv 2307.08691; the online softmax, Milakov and
Gimelshein 2018, arXiv 1805.02867.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxformer.kernels import flash_gpu_backward
from jaxformer.kernels.arithmetic import multiply
from jaxformer.kernels.case import Case, Gradients
from jaxformer.kernels.flash_gpu_tile import (
    CaseRefs,
    Problem,
    bounds,
    load_head,
    logits,
    places,
    prepare,
    product,
    store,
    store_head,
    visible,
    width,
)
from jaxformer.kernels.flash_gpu_walk import lists, walk
from jaxformer.kernels.outputs import output
from jaxformer.kernels.tiles import gpu
from jaxformer.kernels.visits import clip


def forward(
    q: Array, k: Array, v: Array, case: Case, *, interpret: bool = False
) -> tuple[Array, Array]:
    """Attention.

    Args:
      q: `[B, T, N, H]`, bfloat16, float16 or float32, with `H` up to 256.
      k: `[B, S, K, H]`, of the dtype of q.
      v: like k.
      case: everything else.
      interpret: runs the kernel's steps in XLA, on any device, slowly.

    Returns:
      `[B, T, N, H]` like q, and the log of each row's sum of exponentials `[B, N, T]`.

    Raises:
      NotImplementedError: a dtype or a head size that the kernel does not have.
    """
    p = Problem.of(q, k, v, case)
    case = _clipped(case, p)
    size = gpu("forward", p.T, p.S, p.H, p.dtype, laden=p.laden)
    out, lse = pl.pallas_call(
        functools.partial(_forward, p, size),
        out_shape=(
            output(q.shape, q.dtype, q),
            output((p.B, p.N, p.T), jnp.float32, q),
        ),
        grid=(pl.cdiv(p.T, size.queries), p.N, p.B),
        compiler_params=triton.CompilerParams(size.warps, size.stages),
        interpret=interpret,
        name="attention_forward",
    )(q, k, v, CaseRefs.of(case), lists(p, case, size))
    return out, lse


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
    interpret: bool = False,
) -> Gradients:
    """The gradients, from what `forward` was given and gave.

    Args:
      q: as for `forward`, like k, v and case.
      k: see q.
      v: see q.
      case: see q.
      out: what `forward` gave.
      lse: what `forward` gave.
      d_out: gradient by `out`.
      d_lse: gradient by `lse`, `[B, N, T]`; None is 0.
      interpret: as for `forward`.
    """
    p = Problem.of(q, k, v, case)
    case = _clipped(case, p)
    delta = out.astype(jnp.float32) * d_out.astype(jnp.float32)
    delta = delta.sum(-1).swapaxes(1, 2)
    if d_lse is not None:
        delta -= d_lse.astype(jnp.float32)
    # A row without keys: against a sum of inf every weight is 0, whatever the logit.
    empty = lse == -jnp.inf
    lse, delta = jnp.where(empty, jnp.inf, lse), jnp.where(empty, 0, delta)
    rows = flash_gpu_backward.Rows(d_out.astype(v.dtype), lse, delta)
    return flash_gpu_backward.gradients(p, q, k, v, case, rows, interpret)


def _clipped(case: Case, p: Problem) -> Case:
    if case.intervals is None:
        return case
    return dataclasses.replace(case, intervals=clip(case.intervals, p.S))


def _forward(p: Problem, size, q_ref, k_ref, v_ref, case: Case, visits, out_ref, lse_ref):
    """A block of queries of one head against the keys that it sees."""
    # The last queries first: under a causal mask they have the most to do.
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    n, b = pl.program_id(1), pl.program_id(2)
    head = n // p.G
    t = places(block, size.queries, p.T, 0)
    q = prepare(p, load_head(p, q_ref, b, t, n), case.q, b, t)
    ends = bounds(case, b, t)

    def step(_, tile, masked, carry):
        top, total, out = carry
        s = places(tile, size.keys, p.S, 1)
        rows = places(tile, size.keys, p.S, 0)
        k = prepare(p, load_head(p, k_ref, b, rows, head), case.k, b, rows)
        y, _ = logits(product(q, k), case, b, n, t, s)
        if masked:
            y = jnp.where(visible(ends, s, p.S), y, -jnp.inf)
        higher = jnp.maximum(top, y.max(1))
        # -inf - -inf is NaN: until a row sees a key, subtract 0.
        base = jnp.where(higher == -jnp.inf, 0, higher)
        weights = jnp.exp2(y - base[:, None])
        shrink = jnp.exp2(top - base)
        v = load_head(p, v_ref, b, rows, head)
        weighed = [multiply(weights.astype(p.dtype), a, contract=0) for a in v]
        out = [a * shrink[:, None] + y for a, y in zip(out, weighed, strict=True)]
        return higher, total * shrink + weights.sum(1), out

    top = jnp.full((size.queries,), -jnp.inf, jnp.float32)
    total = jnp.zeros((size.queries,), jnp.float32)
    out = [jnp.zeros((size.queries, width(c)), jnp.float32) for _, c in p.cut]
    whole, tiles = p.S // size.keys, pl.cdiv(p.S, size.keys)
    top, total, out = walk(step, (top, total, out), visits, b, block, whole, tiles)

    empty = total == 0
    inverse = 1 / jnp.where(empty, 1, total)
    store_head(p, out_ref, b, t, n, [a * inverse[:, None] for a in out])
    lse = jnp.where(empty, -jnp.inf, top * math.log(2) + jnp.log(total))
    store(lse_ref, b, n, t, value=lse[:, None])
