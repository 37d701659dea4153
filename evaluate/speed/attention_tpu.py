"""The TPU ruler of attention: bytes of a layer, cycles of a kernel, and the price of masks."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evaluate.speed import rivals
from evaluate.speed.bundles import Run
from evaluate.speed.tpu import CORES, Job, Program, programs
from jaxformer.kernels import flash_tpu, flash_tpu_backward
from jaxformer.kernels.case import Case
from jaxformer.kernels.lanes import LANES
from jaxformer.kernels.tiles import up
from jaxformer.layers.attention import Attention
from jaxformer.layers.norm import RMSNorm
from jaxformer.ops import rotary
from jaxformer.ops.attention import known
from jaxformer.ops.mask import BlockDiffusion, Causal, Mask, Prefix, Segments

TOKENS, WIDTH = 16_384, 1_024
LENGTHS, HEADS = (256, 1024, 4096), (64, 72, 128)
WAYS = {  # of a layer: with QK-norm and rotary, and with the backward pass.
    "forward": (False, False),
    "backward": (False, True),
    "fused-forward": (True, False),
    "fused-backward": (True, True),
}
SIZES = (256, 512, 1024, 2048)  # of splash's blocks that `search` tries, beside T.


@dataclasses.dataclass(frozen=True)
class Shape:
    """`B * T` tokens in rows of `T`, and `N` heads of `H`.

    They fill WIDTH lanes, or more where they fit no sooner: 16 heads of 72 fill 1,152.
    """

    T: int
    H: int

    @property
    def B(self) -> int:
        return max(1, TOKENS // self.T)

    @property
    def N(self) -> int:
        return up(WIDTH, math.lcm(self.H, LANES)) // self.H

    @property
    def heads(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, self.T, self.N, self.H), jnp.bfloat16)

    @property
    def flat(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, self.T, self.N * self.H), jnp.bfloat16)

    @property
    def bytes(self) -> int:
        """The unit X: one array of `[B, T, D]`."""
        return self.flat.size * 2


MASKS: dict[str, tuple[int, Callable[[], Mask]]] = {
    "prefix 256 of 1,024": (1024, lambda: Causal() | Prefix(256)),
    "8 packed of 4,096": (
        4096,
        lambda: Segments(jnp.asarray(np.arange(4096, dtype=np.int32)[None] // 512 + 1)),
    ),
    "block diffusion 32, 2 x 1,024": (2048, lambda: BlockDiffusion(32)),
}


def layer(shape: Shape, fused: bool, attend: Callable | None) -> tuple[Callable, dict]:
    """A layer `(params, x) -> y`, and the shapes of its parameters, in bfloat16.

    Every array once through HBM is 12.25 X then, of which the parameters are 0.25. `attend`
    stands between projections written as products of matrices; None is ours, the module
    itself.
    """
    module = Attention(shape.N, shape.H, qk_norm=RMSNorm if fused else None)
    boxed = jax.eval_shape(module.init, jax.random.key(0), shape.flat)
    params = jax.tree.map(_bfloat16, nn.unbox(boxed)["params"])
    angles = rotary.angles(jnp.arange(shape.T)[None], shape.H) if fused else None

    def ours(params, x):
        return module.apply({"params": params}, x, angles=angles)

    def theirs(params, x):
        def project(name, x):
            kernel = params[name]["kernel"].astype(x.dtype)
            return x @ kernel.reshape(x.shape[-1], -1)

        q, k, v = (
            project(name, x).reshape(shape.heads.shape) for name in ("query", "key", "value")
        )
        if angles is not None:
            norm = RMSNorm(letters="H")
            q = jnp.asarray(norm.apply({"params": params["query_norm"]}, q))
            k = jnp.asarray(norm.apply({"params": params["key_norm"]}, k))
            q, k = rotary.rotate(q, angles), rotary.rotate(k, angles)
        assert attend is not None
        return project("out", attend(q, k, v).reshape(x.shape))

    return ours if attend is None else theirs, params


def _bfloat16(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)


def both_ways(layer: Callable) -> Callable:
    """`(params, x, dy) -> y` and the gradients by params and x."""

    def step(params, x, dy):
        y, pull = jax.vjp(layer, params, x)
        return y, pull(dy)

    return step


def bytes_of_layers(
    chips: Iterable[str],
    quick: bool,
    only: Collection[str],
    lengths: Sequence[int] = LENGTHS,
    heads: Sequence[int] = HEADS,
    ways: Sequence[str] = tuple(WAYS),
) -> list[dict]:
    """HBM bytes of attention layers in X, ours beside splash's and XLA's."""
    lengths, heads = ((1024,), (64,)) if quick else (lengths, heads)
    jobs, rows = [], []
    for chip, T, H, way in itertools.product(chips, lengths, heads, ways):
        shape, (fused, backward) = Shape(T, H), WAYS[way]
        sides = {"ours": None, "splash": rivals.splash(T), "XLA": rivals.named("xla")}
        for side, attend in sides.items():
            if side not in only:
                continue
            fn, params = layer(shape, fused, attend)
            arguments = (params, shape.flat, shape.flat) if backward else (params, shape.flat)
            jobs.append(Job(chip, both_ways(fn) if backward else fn, arguments))
            row = {"chip": chip, "T": T, "H": H, "side": side}
            rows.append(row | {"fused": fused, "backward": backward})
    for row, program in zip(rows, programs(jobs), strict=True):
        if isinstance(program, str):
            row["reason"] = program
        else:
            unit = Shape(row["T"], row["H"]).bytes
            row["X"] = program.moved / unit
            row["X_each_array_once"] = program.traffic.bytes / unit
            row["temporaries_X"] = program.memory["temp"] / unit
            row["loops"] = len(program.traffic.loops)
            row["kernels"] = [k.name for k in program.kernels]
            row["vmem"] = [program.traffic.vmem.get(name) for name in row["kernels"]]
            row["largest"] = [(size / unit, name) for size, _, name in program.traffic.rows[:4]]
            row["notes"] = [r for r in program.runs if isinstance(r, str)]
        print(_told(row, "X"), flush=True)
    return rows


def ours(shape: Shape, mask: Mask | None = None, *, backward: bool) -> tuple[Callable, tuple]:
    """Our kernel, called as `attend` calls it."""
    intervals = None if mask is None else mask.intervals(shape.T, shape.T)
    lse = jax.ShapeDtypeStruct((shape.B, shape.N, shape.T), jnp.float32)
    arrays = (shape.heads,) * 3 + ((shape.heads, lse, shape.heads, lse) if backward else ())
    extra = () if intervals is None else (np.asarray(intervals),)

    facts = None if mask is None else known(mask, intervals)

    def fn(q, k, v, *rest):
        case = Case(intervals=rest[-1] if extra else None, known=facts, scale=shape.H**-0.5)
        if not backward:
            return flash_tpu.forward(q, k, v, case)
        out, lse, d_out, d_lse = rest[:4]
        return flash_tpu_backward.backward(q, k, v, case, out, lse, d_out, d_lse)

    return fn, arrays + extra


def theirs(shape: Shape, attend: Callable, *, backward: bool) -> tuple[Callable, tuple]:
    """jax's kernels; backward holds the forward too, which `cycles` leaves out."""

    def fn(q, k, v, dy):
        y, pull = jax.vjp(attend, q, k, v)
        return y, pull(dy)

    return (fn, (shape.heads,) * 4) if backward else (attend, (shape.heads,) * 3)


def cycles(program: Program, chip: str, shape: Shape, backward: bool) -> dict:
    """Cycles a head of the kernels of one direction, the use of the MXU's slots, and VMEM."""
    runs = list(zip(program.kernels, program.runs, strict=True))
    if backward:
        forward = ("fwd", "jit_flash_attention")  # As splash and flash name them.
        runs = [(k, r) for k, r in runs if not any(f in k.name for f in forward)] or runs
    known = [(k, r) for k, r in runs if isinstance(r, Run)]
    for kernel, run in runs:
        if not isinstance(run, Run):
            return {"reason": f"{kernel.name}: {run}"}
    if not runs:
        return {"reason": "no Pallas kernel in the program"}
    total = sum(run.cycles for _, run in known)
    mxu = sum(run.cycles * run.share["MXU"] for _, run in known) / total
    return {
        "cycles_a_head": total * CORES[chip] / (shape.B * shape.N),
        "MXU": mxu,
        "vmem": [program.traffic.vmem.get(kernel.name) for kernel, _ in known],
        "bundles": [len(kernel.use) for kernel, _ in known],
        "steps": [max(int(n) for n in run.counts) for _, run in known],
    }


def cycles_of_kernels(
    chips: Iterable[str], quick: bool, only: Collection[str], heads: Sequence[int] = (64, 128)
) -> list[dict]:
    """Cycles a head of kernels by their final schedules, ours beside those of jax."""
    heads = (64,) if quick else heads
    jobs, rows = [], []
    for chip, H, backward in itertools.product(chips, heads, (False, True)):
        for T in (1024,) if quick else (*LENGTHS, 197, 257, 320):
            shape, row = Shape(T, H), {"chip": chip, "T": T, "H": H, "backward": backward}
            jobs.append(Job(chip, *ours(shape, backward=backward)))
            rows.append(row | {"side": "ours"})
            for side, make in (("splash", rivals.splash), ("flash", rivals.flash)):
                if T in LENGTHS and side in only:
                    jobs.append(Job(chip, *theirs(shape, make(T), backward=backward)))
                    rows.append(row | {"side": side})
    return _cycles(jobs, rows)


def _cycles(jobs: list[Job], rows: list[dict]) -> list[dict]:
    for job, row, program in zip(jobs, rows, programs(jobs), strict=True):
        shape = Shape(row["T"], row["H"])
        if isinstance(program, str):
            row["reason"] = program
        else:
            row |= cycles(program, job.chip, shape, row["backward"])
        print(_told(row, "cycles_a_head"), flush=True)
    return rows


def price_of_masks(
    chips: Iterable[str], quick: bool, only: Collection[str], heads: Sequence[int] = (64, 128)
) -> list[dict]:
    """Cycles by useful area of structured masks, against no mask at the same length."""
    heads = (64,) if quick else heads
    jobs, rows = [], []
    for chip, H, backward in itertools.product(chips, heads, (False, True)):
        for name, (T, make) in MASKS.items():
            shape, mask = Shape(T, H), make()
            dense = np.asarray(mask.dense(T, T))[0]
            for side, masked in itertools.product(("ours", "splash"), (True, False)):
                if side not in only:
                    continue
                if side == "ours":
                    made = ours(shape, mask if masked else None, backward=backward)
                else:
                    attend = rivals.splash(T, dense if masked else None)
                    made = theirs(shape, attend, backward=backward)
                jobs.append(Job(chip, *made))
                rows.append(
                    {"chip": chip, "T": T, "H": H, "backward": backward, "side": side}
                    | {"mask": name if masked else None, "area": float(dense.mean())}
                )
    rows = _cycles(jobs, rows)
    for masked, plain in zip(rows[::2], rows[1::2], strict=True):
        if "cycles_a_head" in masked and "cycles_a_head" in plain:
            ratio = masked["cycles_a_head"] / plain["cycles_a_head"]
            masked["price"] = ratio / masked["area"]
            print(f"  {masked['mask']}: {masked['price']:.2f} x unmasked by useful area")
    return rows


def search(chip: str, T: int, H: int, backward: bool, sizes=SIZES) -> dict:
    """Cycles a head of splash by the choice of its blocks, the best first."""
    shape = Shape(T, H)
    sizes = sorted({min(s, T) for s in sizes})
    blocks = [b for b in itertools.product(sizes, repeat=3) if b[2] <= b[1]]
    first = rivals.BLOCKS.get(("forward", T), blocks[-1])
    jobs = []
    for b in blocks:
        attend = rivals.splash_with(T, first if backward else b, b)
        jobs.append(Job(chip, *theirs(shape, attend, backward=backward)))
    found = {}
    for b, program in zip(blocks, programs(jobs), strict=True):
        told = {} if isinstance(program, str) else cycles(program, chip, shape, backward)
        if "cycles_a_head" in told:
            found[b] = told["cycles_a_head"]
    return dict(sorted(found.items(), key=lambda item: item[1]))


PARTS = {"layers": bytes_of_layers, "kernels": cycles_of_kernels, "masks": price_of_masks}
TITLES = {
    "layers": f"HBM bytes of a layer, {TOKENS:,} tokens, in X = one [B, T, D]",
    "kernels": "cycles a head, by the final schedule",
    "masks": "structured masks",
}


def run(
    chips: Iterable[str],
    quick: bool,
    parts: Iterable[str] = tuple(PARTS),
    sides: Iterable[str] = ("ours", "splash", "flash", "XLA"),
    **which: Sequence,
) -> dict:
    """Everything that can be told of attention on TPUs from here, or some parts of it.

    `which`: the `heads` (their sizes), and of layers `lengths` and `ways`.
    """
    found = {}
    for part in parts:
        print(TITLES[part], flush=True)
        more = which if part == "layers" else {n: x for n, x in which.items() if n == "heads"}
        found[part] = PARTS[part](list(chips), quick, tuple(sides), **more)
    return found


def _told(row: dict, value: str) -> str:
    what = f"  {row['chip']} T={row['T']:<5} H={row['H']:<4} {row['side']:<7}"
    what += "backward " if row["backward"] else "forward  "
    what += "fused " if row.get("fused") else ""
    what += f"{row['mask']} " if row.get("mask") else ""
    if "reason" in row:
        return what + row["reason"]
    what += f"{row[value]:,.2f}"
    return what + (f"  MXU {row['MXU']:.2f}" if "MXU" in row else "")
