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
import itertools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.kernels import parts, tiles, visits
from jaxformer.kernels.arithmetic import LOG2E, multiply
from jaxformer.kernels.case import Case
from jaxformer.kernels.lanes import Lanes, sides

LOW = -1e30  # Stands for -inf where the difference of two must not be NaN.
ONES = 8  # Rows of ones below v^T.
VMEM = 112 * 2**20  # Bytes a kernel may hold, of 128 MiB.
SPARE = 16 * 2**20  # Bytes of VMEM for what the compiler holds in between.


def forward(q: Array, k: Array, v: Array, case: Case, *, interpret=False):
    """Attention and its logsumexp, see `jaxformer.kernels.case`.

    A row of keys that VMEM cannot hold is taken in parts.

    Raises:
      NotImplementedError: a head size that is not a multiple of 8 up to 256, or a dtype
        other than bfloat16 and float32.
    """
    check(q)
    run = functools.partial(_forward, interpret=interpret)
    return parts.forward(run, q, k, v, case, cut(q, k, case, backward=False))


def check(q: Array) -> None:
    """Raises NotImplementedError for what no TPU kernel here can do."""
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise NotImplementedError(f"head size {q.shape[-1]} is not a multiple of 8 up to 256")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"dtype {q.dtype} is not bfloat16 or float32")


@dataclasses.dataclass(frozen=True)
class Step:
    """The static facts of one grid step, shared by forward and backward.

    `T`, `S`: the lengths; `rows`: of key scratch; `masked`: tiles come from a list, and
    those partly seen are masked. `spans`: of keys that each chunk sees, where known.
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
    widen: bool = False

    @property
    def rows(self) -> int:
        return tiles.up(self.S, self.tile.keys) if self.listed else self.S

    @property
    def listed(self) -> bool:
        return self.masked and self.spans is None

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.T, self.tile.queries)

    def multiply(self, a: Array, b: Array, *, contract: int) -> Array:
        if self.widen:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return multiply(a, b, contract=contract)


def _forward(q, k, v, case, *, interpret):
    (B, T, N, H), K = q.shape, k.shape[2]
    step = make_step(q, k, case, backward=False, widen=bool(interpret))
    lanes = step.lanes
    groups = K // lanes.K
    arrays, specs = inputs(q, k, v, case, step)
    out_shape = (
        jax.ShapeDtypeStruct((B, T, N * H), q.dtype),
        jax.ShapeDtypeStruct((B, groups, lanes.N, T), jnp.float32),
    )
    out_specs = (
        specs["q"],
        pl.BlockSpec((1, 1, lanes.N, step.tile.queries), lambda b, g, i: (b, g, 0, i)),
    )
    scratch = [
        pltpu.VMEM((lanes.K // lanes.heads, step.rows, lanes.width), k.dtype),
        pltpu.VMEM((lanes.K, H + ONES, step.rows), v.dtype),
        pltpu.VMEM((lanes.N, step.tile.queries, lanes.width), q.dtype),
        pltpu.VMEM((lanes.N * H, step.tile.queries), jnp.float32),
        pltpu.VMEM((lanes.N, 1, step.tile.queries), jnp.float32),
    ]
    out, lse = pl.pallas_call(
        functools.partial(_kernel, case=case, step=step),
        grid=(B, groups, step.blocks),
        in_specs=(specs,),
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=compiler_params((arrays, *out_shape), (specs, *out_specs), scratch),
        interpret=interpret,
        name="flash_forward",
    )(arrays)
    return out.reshape(q.shape), lse.reshape(B, N, T)


def make_step(q, k, case, *, backward, widen=False) -> Step:
    """Chooses tiles and heads a step."""
    (_, T, N, H), (_, S, K, _) = q.shape, k.shape
    masked = case.intervals is not None
    if masked and case.known is not None:
        tile = tiles.tpu_known(T, S, H, backward=backward)
        spans = visits.spans(case.known.intervals, S, tile.chunk, tile.keys)
        lanes = Lanes.of(N, K, H, tile.lanes)
        if (
            sum(size for chunk in spans for _, size, _ in chunk) * tile.chunk * lanes.N
            <= tile.most
        ):
            return Step(lanes, tile, T, S, True, spans, widen)
    tile = tiles.tpu(T, S, H, masked=masked, backward=backward)
    lanes = Lanes.of(N, K, H, tile.lanes)
    if backward and lanes.N * H > 1024 and tile.queries > 512:  # They would not fit.
        tile = dataclasses.replace(tile, queries=512, chunk=512)
    return Step(lanes, tile, T, S, masked, widen=widen)


def cut(q, k, case, *, backward) -> list[slice]:
    """Parts of the keys, each short enough to lie in VMEM whole."""
    step = make_step(q, k, case, backward=backward)
    lanes, size = step.lanes, k.dtype.itemsize
    flat, wide = lanes.K * lanes.H, lanes.K // lanes.heads * lanes.width
    row = 4 * flat * size + wide * size + (flat + lanes.K * ONES) * size
    if backward:
        row += 4 * flat * size + wide * (size + 8)
    if case.k.cos is not None:
        row += 16 * lanes.width
    block = step.tile.queries * (flat * lanes.G * (12 if backward else 8) * size)
    return parts.cut(step.S, max(512, (VMEM - SPARE - block) // row // 512 * 512))


def compiler_params(arrays, specs, scratch):
    """Blocks of queries share the scratch of their keys; all else is independent.

    No more VMEM is asked for than the kernel needs: in the rest XLA may keep arrays.
    """
    blocks = jax.tree.map(
        lambda x, s: math.prod(s.block_shape or ()) * x.dtype.itemsize, arrays, specs
    )
    held = sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in scratch)
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=2 * sum(jax.tree.leaves(blocks)) + held + SPARE,
    )


def flat(x: Array) -> Array:
    """Heads side by side: `[B, T, N, H]` -> `[B, T, N * H]`."""
    return x.reshape(*x.shape[:2], -1)


def inputs(q, k, v, case, step):
    """What a kernel reads, and how it is cut into blocks, by name."""
    lanes, H, bq, S = step.lanes, step.lanes.H, step.tile.queries, step.S
    arrays: dict = {"q": flat(q), "k": flat(k), "v": flat(v)}
    whole = pl.BlockSpec((1, S, lanes.K * H), lambda b, g, i: (b, 0, g))
    specs: dict = {
        "q": pl.BlockSpec((1, bq, lanes.N * H), lambda b, g, i: (b, i, g)),
        "k": whole,
        "v": whole,
    }
    if case.intervals is not None:
        x, b0 = case.intervals, int(case.intervals.shape[0] > 1)
        arrays["intervals"] = x
        specs["intervals"] = pl.BlockSpec((1, x.shape[1], bq), lambda b, g, i: (b * b0, 0, i))
        if step.listed:
            kind = visits.kinds(visits.clip(x, S), S, bq, step.tile.keys)
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
    for name, rows in (("q", bq), ("k", S)):
        specs["sides"][name] = {
            n: _side_spec(x, rows, name == "q") for n, x in arrays["sides"][name].items()
        }
    return arrays, specs


def _side_spec(x, rows, moves):
    if x.ndim == 2:
        return pl.BlockSpec(x.shape, lambda b, g, i: (0, 0))
    b2 = int(x.shape[0] > 1)
    return pl.BlockSpec((1, rows, x.shape[2]), lambda b, g, i: (b * b2, i if moves else 0, 0))


def read_side(refs) -> dict[str, Array]:
    """The weights and angles of one side, out of their blocks."""
    return {name: ref[0] if ref.ndim == 3 else ref[...] for name, ref in refs.items()}


def prepared(lanes, ref, refs, side):
    """Windows of queries or keys one by one, normalised and rotated in float32."""
    read = read_side(refs)
    for w in lanes.split(ref.at[0]):
        if side.plain:
            yield w
        else:
            yield lanes.prepare(w.astype(jnp.float32), read, side).astype(w.dtype)


def lay_keys(windows, scr, step):
    """Lays windows of keys or values into scratch; where there is no key, they are 0."""
    for u, w in enumerate(windows):
        if step.rows > step.S:
            scr[u, step.S // 16 * 16 :] = jnp.zeros_like(scr[u, step.S // 16 * 16 :])
        scr[u, : step.S] = w


def lay_queries(windows, scr, lanes):
    """Lays windows of queries into scratch: one a head, the others' lanes 0."""
    for u, w in enumerate(windows):
        for h in range(u * lanes.heads, (u + 1) * lanes.heads):
            scr[h] = lanes.only(w, h)


def load_keys(refs, scr, case, step):
    """Prepares the keys of a step, once for all blocks of queries."""
    lay_keys(prepared(step.lanes, refs["k"], refs["sides"]["k"], case.k), scr, step)


def load_queries(refs, scr, case, step):
    """Prepares a block of queries."""
    lay_queries(prepared(step.lanes, refs["q"], refs["sides"]["q"], case.q), scr, step.lanes)


def load_values(v, vt_scr, step):
    """Transposes the values of a step, with rows of ones below; without a key, they are 0."""
    H, S = step.lanes.H, step.S
    vt = v.T
    for j in range(step.lanes.K):
        if step.rows > S:
            vt_scr[j, :H, S // 128 * 128 :] = jnp.zeros_like(vt_scr[j, :H, S // 128 * 128 :])
        vt_scr[j, :H, :S] = vt[j * H : (j + 1) * H]
        vt_scr[j, H:] = jnp.ones_like(vt_scr[j, H:])


def logits(refs, q, k, place, head, chunk, start, case, step, bounds):
    """Logits in base 2, `[keys, queries]`, who sees whom, and the slope of the soft-cap.

    `place`: the group of heads and the block of queries. `head` counts in the step,
    `chunk` and `start` are the first query and key; see `visits.Spans` for `bounds`.
    """
    # In float32: it would round q another time, and logits by 2^-9.
    factor = case.scale / case.softcap if case.softcap else case.scale * LOG2E
    s, slope = step.multiply(k, q, contract=1) * factor, None
    if case.softcap:
        t = jnp.tanh(s)
        s, slope = t * (case.softcap * LOG2E), 1 - jnp.square(t)
    if case.bias is not None:
        n = head if refs["bias"].shape[1] > 1 else 0
        bias = refs["bias"][0, n, pl.ds(chunk, q.shape[0]), pl.ds(start, k.shape[0])]
        bias = bias.astype(jnp.float32).T * LOG2E
        if step.T % step.tile.queries:  # Beyond the queries lies anything, and NaN stays.
            first = place[1] * step.tile.queries + chunk
            query = first + lax.broadcasted_iota(jnp.int32, (1, q.shape[0]), 1)
            bias = jnp.where(query < step.T, bias, 0.0)
        s += bias
    index = start + lax.broadcasted_iota(jnp.int32, s.shape, 0)
    if case.slopes is not None:
        group, block = place
        steep = refs["slopes"][group * step.lanes.N + head] * LOG2E
        first = block * step.tile.queries + chunk + case.offset
        query = first + lax.broadcasted_iota(jnp.int32, s.shape, 1)
        s -= steep * jnp.abs(query - index).astype(jnp.float32)
    if not bounds:
        return s, None, slope
    rows, seen = refs["intervals"][0, :, pl.ds(chunk, q.shape[0])], []
    for n in range(0, rows.shape[0], 2):
        inside = []
        if n in bounds:
            inside.append(index >= rows[n : n + 1])
        if n + 1 in bounds:
            inside.append(index < rows[n + 1 : n + 2])
        if inside:
            seen.append(functools.reduce(jnp.logical_and, inside))
    seen = functools.reduce(jnp.logical_or, seen)
    return s, seen & (index < step.S) if step.rows > step.S else seen, slope


def _kernel(refs, o_ref, lse_ref, k_scr, vt_scr, q_scr, ot_scr, lse_scr, *, case, step):
    lanes = step.lanes
    place = pl.program_id(1), pl.program_id(2)  # Not to be asked for inside of a loop.

    def keys():
        load_keys(refs, k_scr, case, step)
        load_values(refs["v"][0], vt_scr, step)

    if step.blocks > 1:
        pl.when(place[1] == 0)(keys)
    else:
        keys()
    load_queries(refs, q_scr, case, step)

    def scores(chain, tile, bounds):
        (head, chunk), (start, size) = chain, tile
        q = q_scr[head, pl.ds(chunk, step.tile.chunk)]
        k = k_scr[lanes.window(head), pl.ds(start, size)]
        return logits(refs, q, k, place, head, chunk, start, case, step, bounds)

    def absorb(state, chain, tile, s, seen, _):
        (head, _), (start, size) = chain, tile
        if seen is not None:
            s = jnp.where(seen, s, 3 * LOW)
        new = s.max(0, keepdims=True)
        new = jnp.maximum(LOW, new) if state is None else jnp.maximum(state[0], new)
        p = jnp.exp2(s - new).astype(vt_scr.dtype)
        vt = vt_scr[lanes.key_head(head), :, pl.ds(start, size)]
        acc = step.multiply(vt, p, contract=0)
        if state is not None:
            top, before = state
            acc += before * jnp.exp2(top - new)
        return new, acc

    def start():
        acc = jnp.zeros((lanes.H + ONES, step.tile.chunk), jnp.float32)
        return jnp.full((1, step.tile.chunk), LOW), acc

    def finish(state, chain):
        (top, acc), (head, chunk) = state, chain
        total = acc[lanes.H : lanes.H + 1]
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        rows = pl.ds(head * lanes.H, lanes.H)
        ot_scr[rows, pl.ds(chunk, step.tile.chunk)] = acc[: lanes.H] * (1 / safe)
        lse = jnp.where(some, (top + jnp.log2(safe)) / LOG2E, -jnp.inf)
        lse_scr[head, :, pl.ds(chunk, step.tile.chunk)] = lse

    sweep(refs, step, start, scores, absorb, finish)
    o_ref[0] = ot_scr[...].T.astype(o_ref.dtype)
    for h in range(lanes.N):
        lse_ref[0, 0, h : h + 1] = lse_scr[h]


def sweep(refs, step, start, scores, absorb, finish):
    """Every head and chunk of queries over the tiles it sees.

    Some (head, chunk) chains go side by side, since a chain alone waits for itself:
    `scores` of the next ones are asked for before those at hand are absorbed.
    """
    ahead = step.tile.ahead
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
                n, (start, size, bounds) = items[at]
                ready.append(scores(chains[n], (start, size), bounds))
            if at >= ahead:
                n, (start, size, _) = items[at - ahead]
                states[n] = absorb(states[n], chains[n], (start, size), *ready.pop(0))
        return states

    def heads(first):
        chains = [(first + h, c) for h in range(side) for c in chunks]
        see = listed if step.listed else every if step.spans is None else known
        for state, chain in zip(see(chains), chains, strict=True):
            finish(start() if state is None else state, chain)

    def known(chains):
        spans = [step.spans[c // step.tile.chunk] for _, c in chains]
        return visit([None] * len(chains), chains, spans)

    def every(chains):
        keys = step.tile.keys
        spans = [(s, min(keys, step.S - s), ()) for s in range(0, step.S, keys)]
        many = max(1, step.tile.unrolled // len(chains))
        loops = step.S // keys // many if len(spans) > many else 0

        def body(n, states):
            base = pl.multiple_of(n * (many * keys), keys)
            spans = [(base + m * keys, keys, ()) for m in range(many)]
            return visit(list(states), chains, [spans] * len(chains))

        states = [None] * len(chains)
        if loops:
            states = [start() for _ in chains]
            states = lax.fori_loop(0, loops, body, states)
        return visit(list(states), chains, [spans[loops * many :]] * len(chains))

    def listed(chains):
        ref = refs["visits"]

        def body(bounds, n, states):
            start = pl.multiple_of(ref[0, 0, 0, 2 + n] * step.tile.keys, step.tile.keys)
            spans = [(start, step.tile.keys, bounds)]
            return visit(list(states), chains, [spans] * len(chains))

        full, total = ref[0, 0, 0, 0], ref[0, 0, 0, 1]
        states = [start() for _ in chains]
        every_bound = tuple(range(refs["intervals"].shape[1]))
        states = lax.fori_loop(0, full, functools.partial(body, ()), states)
        return lax.fori_loop(full, total, functools.partial(body, every_bound), states)

    groups = step.lanes.N // side
    tiles_each = len(chunks) * side * pl.cdiv(step.S, step.tile.keys)
    if groups == 1 or groups * tiles_each <= step.tile.unrolled:
        for n in range(groups):
            heads(n * side)
    else:
        lax.fori_loop(0, groups, lambda n, _: heads(n * side) or _, 0)
