"""Flash attention for TPUs, forward: softmax attention that never leaves the chip.

The keys and values of some heads lie in VMEM whole, and blocks of queries pass over them.
Logits are made transposed, `[keys, queries]`: then the maximum, the sum and the intervals
of a query are rows that broadcast for free, and every product but `v^T`, which is
transposed once, reads its operands as they lie. Rows of ones below `v^T` make the softmax's
sum in the same product. Sources: FlashAttention (Dao et al. 2022, arXiv 2205.14135), the
online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.kernels import cost, parts, tiles, visits
from jaxformer.kernels.arithmetic import LOG2E, multiply
from jaxformer.kernels.case import Case, Side
from jaxformer.kernels.flash_tpu_tile import (
    as_they_lie,
    by_rows,
    clear_tail,
    keys_of,
    lay,
    lay_apart,
    logits,
    one_or_many,
    prepared,
    sweep,
)
from jaxformer.kernels.lanes import LANES, Lanes, sides
from jaxformer.kernels.outputs import output

LOW = -1e30  # Stands for -inf where the difference of two must not be NaN.
ONES = 8  # Rows of ones below v^T.
LEAST = tiles.LEAST
SHARE = 0.9  # Of VMEM, so much a kernel may hold;
SPARE = 16 * 2**20  # and so many bytes more, where they are, the compiler in between.


def forward(q: Array, k: Array, v: Array, case: Case, *, interpret=False):
    """Attention and its logsumexp, see `jaxformer.kernels.case`.

    A row of keys that VMEM cannot hold is taken in parts.

    Raises:
      NotImplementedError: a head size that is not a multiple of 8 up to 256, a dtype
        other than bfloat16 and float32, several dtypes, or one query on a chip.
    """
    check(q, k, v, interpret)
    run = functools.partial(_forward, interpret=interpret)
    return parts.forward(run, q, k, v, case, cut(q, k, case, interpret, backward=False))


def check(q: Array, k: Array, v: Array, interpret: Any = False) -> None:
    """Raises NotImplementedError for what no TPU kernel here can do."""
    if q.shape[1] == 1 and not interpret:
        raise NotImplementedError("one query: Mosaic multiplies no matrix with a bfloat16 row")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise NotImplementedError(f"head size {q.shape[-1]} is not a multiple of 8 up to 256")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"dtype {q.dtype} is not bfloat16 or float32")
    if not q.dtype == k.dtype == v.dtype:
        dtypes = f"{q.dtype}, {k.dtype}, {v.dtype}"
        raise NotImplementedError(f"the TPU kernel needs one dtype, got {dtypes}")


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The static facts of one grid step, shared by forward and backward.

    `T`, `S`: the lengths; `rows`: of key scratch; `masked`: tiles come from a list, and
    those partly seen are masked. `spans`: of keys that each chunk sees, where known, and
    the `patterns` of those that some see.
    `single`: VMEM holds the keys of one row and not the next row's too.
    `widen`: products take float32, which gives the same sums. Where a kernel is
    interpreted on a CPU, XLA moves a transpose into the product that takes it, and that of
    jax 0.12 has no such product of bfloat16.
    """

    lanes: Lanes
    tile: tiles.Tpu
    T: int
    S: int
    masked: bool
    spans: visits.Spans | None = None
    patterns: Sequence[np.ndarray] = ()
    single: bool = False
    widen: bool = False

    @property
    def rows(self) -> int:
        return tiles.up(self.S, self.tile.listed) if self.listed else self.S

    @property
    def listed(self) -> bool:
        return self.masked and self.spans is None

    @property
    def windows(self) -> int:
        return self.lanes.K // self.lanes.heads

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.T, self.tile.queries)

    def multiply(self, a: Array, b: Array, *, contract: int) -> Array:
        if self.widen:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return multiply(a, b, contract=contract)


def _forward(q, k, v, case, part, *, interpret):
    (B, T, N, H), K, some = q.shape, k.shape[2], part.shape(k)
    step = make_step(q, some, case, backward=False, widen=bool(interpret), room=part.size)
    lanes = step.lanes
    groups = K // lanes.K
    arrays, specs = inputs(q, k, v, case, part, step)
    out_shape = (
        output((B, T, N * H), q.dtype, q),
        output((B, groups, lanes.N, T), jnp.float32, q),
    )
    out_specs = (
        specs["q"],
        pl.BlockSpec((1, 1, lanes.N, step.tile.queries), lambda b, g, i: (b, g, 0, i)),
    )
    scratch = {
        "vt": pltpu.VMEM((lanes.K, H + ONES, step.rows), v.dtype),
        "q": pltpu.VMEM((lanes.N, step.tile.queries, lanes.span), q.dtype),
        "out": pltpu.VMEM((lanes.N * H, step.tile.queries), jnp.float32),
        "lse": pltpu.VMEM((lanes.N, 1, step.tile.queries), jnp.float32),
    }
    if not as_they_lie(case.k, step):
        scratch["k"] = pltpu.VMEM(lanes.laid(step.rows), k.dtype)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, case=case, step=step),
        grid=(B, groups, step.blocks),
        in_specs=(specs,),
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[scratch],
        compiler_params=compiler_params(
            (arrays, *out_shape), (specs, *out_specs), scratch.values()
        ),
        cost_estimate=cost.estimate(q, some, case, cost.FORWARD, arrays, out_shape),
        interpret=interpret,
        name="flash_forward",
    )(arrays)
    return out.reshape(q.shape), lse.reshape(B, N, T)


def make_step(q, k, case, *, backward, widen=False, room=0) -> Step:
    """Chooses tiles and heads a step; where it is for a part of keys, `room` for so many."""
    (_, T, N, H), (_, S, K, _) = q.shape, k.shape
    most = max(S, room)
    masked = case.intervals is not None
    if masked and case.known is not None:
        tile = tiles.tpu_known(T, S, H, backward=backward)
        found = visits.spans(case.known.intervals, S, tile.chunk, tile.keys)
        logits = sum(size * count for chunk in found[0] for _, size, _, (_, count) in chunk)
        for lanes in (Lanes.of(N, K, H, tile.lanes // n) for n in (1, 2)):
            if logits * lanes.N <= tile.most:
                return Step(lanes, tile, T, S, True, *found, widen=widen)
    size = k.dtype.itemsize
    tile = tiles.tpu(T, S, H, masked=masked, backward=backward, itemsize=size, vmem=vmem())
    # Where keys are shared, each of them brings some heads of queries.
    lanes = Lanes.of(N, K, H, max(256, tile.lanes * K // N) if masked else tile.lanes)
    if backward and masked and lanes.N * H > 1024:  # Nor would two key heads of many queries.
        lanes = Lanes.of(N, K, H, 128)
    step = Step(lanes, tile, T, S, masked, widen=widen)
    block, row = held(step, k, case, backward=backward)
    if lanes.N * H > 1024 and tile.queries > 512 and block + most * row > SHARE * LEAST:
        step = fewer(step, 512)
        block, row = held(step, k, case, backward=backward)
    step = dataclasses.replace(step, single=block + most * row > SHARE * LEAST)
    block, row = held(step, k, case, backward=backward)
    if lanes.uneven and block + most * row > SHARE * vmem():
        step = dataclasses.replace(step, lanes=dataclasses.replace(lanes, astride=True))
        block, row = held(step, k, case, backward=backward)
        if block + most * row > SHARE * vmem() and tile.queries > 256:
            step = fewer(step, 256)
            block, row = held(step, k, case, backward=backward)
    # Many heads of queries to a key, or of a bias: a part of the keys has to fit beside them.
    while block + min(most, parts.GRAIN) * row > SHARE * vmem() and step.tile.queries > LANES:
        step = fewer(step, max(LANES, step.tile.queries // 2 // LANES * LANES))
        block, row = held(step, k, case, backward=backward)
    return step


def fewer(step: Step, queries: int) -> Step:
    """A step that takes so many queries at a time."""
    tile = dataclasses.replace(step.tile, queries=queries, chunk=queries)
    return dataclasses.replace(step, tile=tile)


def held(step, k, case, *, backward) -> tuple[int, int]:
    """Bytes that a kernel holds, in all but keys and for each of them."""
    lanes, size = step.lanes, k.dtype.itemsize
    flat, wide = lanes.K * lanes.H, math.prod(lanes.laid(1))
    copies = 2 if step.single else 4
    apart = [not (lanes.astride and as_they_lie(side, step)) for side in (case.k, Side())]
    row = copies * flat * size + apart[0] * wide * size + (flat + lanes.K * ONES) * size
    if backward:
        row += copies * flat * size + wide * (apart[1] * size + 8)
    if case.k.cos is not None:
        row += (8 if step.single else 16) * lanes.width
    if case.bias is not None:  # A block of it, and of its gradient for every head.
        heads = lanes.N if case.bias.shape[1] > 1 else 1
        grown = 4 * lanes.N if backward and case.learns_bias else 0
        row += 2 * step.tile.queries * (heads * case.bias.dtype.itemsize + grown)
    # Of queries: blocks that come and go, each twice; windows of their own; and what is made
    # of them in float32. Backward a part holds one block more, in what is spared.
    blocks, windows = (4, 2) if backward else (2, 1)
    each = (2 * blocks * size + 4) * flat * lanes.G + windows * size * lanes.N * lanes.span
    return step.tile.queries * each, row


def cut(q, k, case, interpret: Any = False, *, backward) -> list[parts.Part]:
    """Parts of the keys, each short enough to lie in VMEM whole.

    Raises:
      NotImplementedError: on a chip, not even one part fits beside a block of queries.
    """
    step = make_step(q, k, case, backward=backward)
    block, row = held(step, k, case, backward=backward)
    room, size = int(SHARE * vmem()), min(step.S, parts.GRAIN)
    if block + size * row > room and not interpret:
        raise NotImplementedError(
            f"{step.lanes.N} heads a step and {size} keys need {(block + size * row) >> 20} "
            f"MiB of VMEM, and there are {room >> 20}"
        )
    grains = (room - block) // row // parts.GRAIN
    return parts.cut(step.S, max(1, grains) * parts.GRAIN)


def vmem() -> int:
    """Bytes of VMEM of the chip that a program is traced for, by the mesh around it.

    Else of this machine's chip; where that is no TPU, of the one that has the least.
    """
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return LEAST


def compiler_params(arrays, specs, scratch):
    """Blocks of queries share the scratch of their keys; all else is independent.

    No more VMEM is asked for than the kernel needs: in the rest XLA may keep arrays.
    """

    def block(x, spec):
        copies = 2 if spec.pipeline_mode is None else spec.pipeline_mode.buffer_count
        return copies * math.prod(spec.block_shape or ()) * x.dtype.itemsize

    total = sum(jax.tree.leaves(jax.tree.map(block, arrays, specs)))
    total += sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in scratch)
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=min(total + SPARE, max(vmem(), total)),
    )


def flat(x: Array) -> Array:
    """Heads side by side: `[B, T, N, H]` -> `[B, T, N * H]`."""
    return x.reshape(*x.shape[:2], -1)


def inputs(q, k, v, case, part, step):
    """What a kernel reads, and how it is cut into blocks, by name.

    `k` and `v` are whole; all else of keys is of the part alone.
    """
    lanes, H, bq, S = step.lanes, step.lanes.H, step.tile.queries, step.S
    arrays: dict = {"q": flat(q), "k": flat(k), "v": flat(v)}
    whole = pl.BlockSpec(
        (1, part.size, lanes.K * H),
        lambda b, g, i: (b, part.number, g),
        pipeline_mode=pl.Buffered(1) if step.single else None,
    )
    specs: dict = {
        "q": pl.BlockSpec((1, bq, lanes.N * H), lambda b, g, i: (b, i, g)),
        "k": whole,
        "v": whole,
    }
    if step.patterns:
        arrays["unseen"] = x = _unseen(step.patterns)
        specs["unseen"] = pl.BlockSpec(x.shape, lambda b, g, i: (0, 0, 0))
    if step.listed:
        x, b0 = case.intervals, int(case.intervals.shape[0] > 1)
        arrays["intervals"] = x
        specs["intervals"] = pl.BlockSpec((1, x.shape[1], bq), lambda b, g, i: (b * b0, 0, i))
        kind = visits.kinds(visits.clip(x, S), S, bq, step.tile.listed)
        order, counts = visits.Visits.of(kind)
        arrays["visits"] = jnp.concatenate([counts, order], -1)[:, :, None]
        specs["visits"] = pl.BlockSpec(
            (1, 1, *arrays["visits"].shape[2:]),
            lambda b, g, i: (b * b0, i, 0, 0),
            memory_space=pltpu.SMEM,
        )
    if case.bias is not None:
        b1, n1 = (int(n > 1) for n in case.bias.shape[:2])
        heads = lanes.N if n1 else 1
        arrays["bias"] = case.bias
        specs["bias"] = pl.BlockSpec(
            (1, heads, bq, step.rows), lambda b, g, i: (b * b1, g * n1, i, 0)
        )
    if case.slopes is not None:
        arrays["slopes"] = case.slopes
        specs["slopes"] = pl.BlockSpec(memory_space=pltpu.SMEM)
    arrays["sides"] = sides(case, lanes)
    specs["sides"] = {}
    for name, rows, mode in (("q", bq, None), ("k", S, whole.pipeline_mode)):
        specs["sides"][name] = {
            n: _side_spec(x, rows, name == "q", mode) for n, x in arrays["sides"][name].items()
        }
    return arrays, specs


def _unseen(patterns: Sequence[np.ndarray]) -> Array:
    """Patterns as what is added to logits, `[patterns, keys, queries]`."""
    keys, queries = (max(p.shape[n] for p in patterns) for n in (0, 1))
    x = np.full((len(patterns), keys, queries), 3 * LOW, np.float32)
    for n, p in enumerate(patterns):
        x[n, : p.shape[0], : p.shape[1]][p] = 0
    return jnp.asarray(x)


def _side_spec(x, rows, moves, mode):
    if x.ndim == 2:
        return pl.BlockSpec(x.shape, lambda b, g, i: (0, 0))
    b2, block = int(x.shape[0] > 1), (1, rows, x.shape[2])
    return pl.BlockSpec(
        block, lambda b, g, i: (b * b2, i if moves else 0, 0), pipeline_mode=mode
    )


def _kernel(refs, o_ref, lse_ref, scr, *, case, step):
    lanes, H = step.lanes, step.lanes.H
    place = pl.program_id(1), pl.program_id(2)  # Not to be asked for inside of a loop.

    def keys():
        if "k" in scr:
            clear_tail(scr["k"], step, axis=1)
        clear_tail(scr["vt"], step, axis=2)
        scr["vt"][:, H:] = jnp.ones_like(scr["vt"][:, H:])
        by_rows(some_keys, step.S, step.windows, step)

    def some_keys(start, size):
        rows = pl.ds(start, size)
        if "k" in scr:
            lay(lanes, prepared(lanes, refs, "k", case.k, rows), scr["k"], rows)
        vt = refs["v"][0, rows].T
        for j in range(lanes.K):
            scr["vt"][j, :H, rows] = vt[j * H : (j + 1) * H]

    def some_queries(start, size):
        rows = pl.ds(start, size)
        lay_apart(lanes, prepared(lanes, refs, "q", case.q, rows), scr["q"], rows)

    if step.blocks > 1:
        pl.when(place[1] == 0)(keys)
    else:
        keys()

    def scores(chain, tile, bounds):
        (head, first, count), (start, size) = chain, tile
        q = scr["q"][head, pl.ds(first, count)]
        k = keys_of(refs, scr, "k", head, pl.ds(start, size), step)
        return logits(refs, q, k, place, head, first, start, case, step, bounds)

    def absorb(state, chain, tile, s, seen, _):
        (head, _, _), (start, size) = chain, tile
        if seen is not None:
            s = jnp.where(seen, s, 3 * LOW)
        new = s.max(0, keepdims=True)
        new = jnp.maximum(LOW, new) if state is None else jnp.maximum(state[0], new)
        p = jnp.exp2(s - new).astype(scr["vt"].dtype)
        vt = scr["vt"][lanes.key_head(head), :, pl.ds(start, size)]
        acc = step.multiply(vt, p, contract=0)
        if state is not None:
            top, before = state
            acc += before * jnp.exp2(top - new)
        return new, acc

    def start():
        acc = jnp.zeros((H + ONES, step.tile.chunk), jnp.float32)
        return jnp.full((1, step.tile.chunk), LOW), acc

    def finish(state, chain):
        (top, acc), (head, first, count) = state, chain
        total = acc[H : H + 1]
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        rows = pl.ds(head * H, H)
        scr["out"][rows, pl.ds(first, count)] = acc[:H] * (1 / safe)
        lse = jnp.where(some, (top + jnp.log2(safe)) / LOG2E, -jnp.inf)
        scr["lse"][head, :, pl.ds(first, count)] = lse

    def write(start, size):
        rows = pl.ds(start, size)
        o_ref[0, rows] = scr["out"][:, rows].T.astype(o_ref.dtype)

    def queries(alone):
        by_rows(some_queries, step.tile.queries, lanes.N, step)
        sweep(refs, step, start, scores, absorb, finish, alone=alone)
        by_rows(write, step.tile.queries, lanes.N, step)
        for h in range(lanes.N):
            lse_ref[0, 0, h : h + 1] = scr["lse"][h]

    one_or_many(refs, step, queries)
