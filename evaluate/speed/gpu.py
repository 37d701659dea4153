"""The GPU ruler of attention: TFLOP/s by useful area, every side in turns in one run.

A forward pass counts `4 B N H` a visible pair of query and key, a backward pass 2.5 times
that (the count of FlashAttention-2 and 3). Dispatches are queued back to back and waited
for once, so that launching them is hidden behind the work. Each side is checked against
float32 before it is timed.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from evaluate.speed import rivals
from evaluate.speed.attention_tpu import MASKS
from jaxformer.ops.attention import attend
from jaxformer.ops.mask import Mask

TOKENS, WIDTH = 16_384, 2_048  # B * T and, nearly, N * H.
LENGTHS, HEADS = (512, 1024, 2048, 4096), (64, 72, 128)
ODD = (197, 257)  # lengths of image transformers that no block divides.
SECONDS = 0.1  # of work that one timing holds, about.
TOLERANCE = 4.0  # times the error that XLA's attention makes in the same dtype.


def sides(mask: Mask | None, T: int) -> dict[str, Callable]:
    """Who is timed: `(q, k, v) -> out` by name."""
    dense = None if mask is None else mask.dense(T, T)

    def ours(impl):
        return lambda q, k, v: attend(q, k, v, mask=mask, impl=impl)

    def other(side):
        return lambda q, k, v: side(q, k, v, dense)

    found = {
        "ours": ours("gpu"),
        "auto": ours("auto"),
        "cuDNN": other(rivals.named("cudnn")),
        "XLA": other(rivals.named("xla")),
    }
    try:
        found["tokamax"] = other(rivals.tokamax())
    except Exception as error:  # Not installed, or at odds with this jax.
        print(f"  tokamax: {type(error).__name__}: {error}")
    return found


def passes(side: Callable, backward: bool) -> Callable:
    """What is timed: the forward pass, or the forward and backward pass."""
    if not backward:
        return jax.jit(side)

    def both(q, k, v, dy):
        out, pull = jax.vjp(side, q, k, v)
        return out, pull(dy)

    return jax.jit(both)


def errors(found, exact) -> list[float]:
    """The root mean square error of each array, of the exact one's."""

    def one(a, b):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))

    return [
        one(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    ]


def seconds(call: Callable, repeats: int) -> float:
    """Of one call, `repeats` of them in a row."""
    start = time.perf_counter()
    out = None
    for _ in range(repeats):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def case(T: int, H: int, name: str | None, rounds: int) -> list[dict]:
    """Every side on one shape and mask."""
    mask = None if name is None else MASKS[name][1]()
    B, N = max(1, TOKENS // T), -(-WIDTH // H)
    area = 1.0 if mask is None else float(np.asarray(mask.dense(T, T)).mean())
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dy = (jax.random.normal(key, (B, T, N, H), jnp.bfloat16) for key in keys)
    few = [x[:1, :, :2] for x in (q, k, v, dy)]
    dense = None if mask is None else mask.dense(T, T)
    wide = [x.astype(jnp.float32) for x in few]
    exact = passes(lambda q, k, v: rivals.exact(q, k, v, dense), True)(*wide)
    found = sides(mask, T)
    limits = errors(passes(found["XLA"], True)(*few), exact)
    rows, times = [], {}
    for side, fn in found.items():
        row = {"T": T, "H": H, "B": B, "N": N, "mask": name, "area": area, "side": side}
        rows.append(row)
        try:
            row["errors"] = errors(passes(fn, True)(*few), exact)
            pairs = zip(row["errors"], limits, strict=True)
            if not all(e <= TOLERANCE * max(x, 1e-3) for e, x in pairs):
                row["reason"] = f"wrong: errors {row['errors']}, XLA's {limits}"
                continue
            calls = {}
            for way, arrays in (("forward", (q, k, v)), ("both", (q, k, v, dy))):
                compiled = passes(fn, way == "both")
                jax.block_until_ready(compiled(*arrays))
                once = seconds(lambda c=compiled, a=arrays: c(*a), 3)
                repeats = max(3, int(SECONDS / once))
                calls[way] = (lambda c=compiled, a=arrays: c(*a), repeats)
            times[side] = (calls, {"forward": [], "both": []})
        except Exception as error:  # What a side cannot do is a row of the table.
            row["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    for _, way in itertools.product(range(rounds), ("forward", "both")):
        for calls, taken in times.values():
            taken[way].append(seconds(*calls[way]))
    work = 4 * B * N * H * T * T * area / 1e12
    for row in rows:
        if row["side"] in times:
            taken = times[row["side"]][1]
            forward = statistics.median(taken["forward"])
            backward = statistics.median(
                b - f for b, f in zip(taken["both"], taken["forward"], strict=True)
            )
            row |= {"forward_ms": 1e3 * forward, "backward_ms": 1e3 * backward}
            row |= {"forward": work / forward, "backward": 2.5 * work / backward}
        print(_told(row), flush=True)
    return rows


def run(rounds: int, quick: bool) -> dict:
    """All shapes and masks; TFLOP/s are `forward` and `backward` of each row."""
    print(f"attention, bf16, {TOKENS:,} tokens, medians of {rounds} rounds in turns, TFLOP/s")
    cases: list[tuple[int, int, str | None]] = [
        (T, H, None) for H, T in itertools.product(HEADS, (*LENGTHS, *ODD))
    ]
    cases += [(T, H, name) for name, (T, _) in MASKS.items() for H in (64, 128)]
    if quick:
        cases = [(1024, 64, None), (1024, 64, next(iter(MASKS)))]
    rows = []
    for T, H, name in cases:
        try:
            rows += case(T, H, name, rounds)
        except Exception as error:  # The other cases are still worth having.
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            rows.append({"T": T, "H": H, "mask": name, "side": "all", "reason": reason})
            print(_told(rows[-1]), flush=True)
    return {"rounds": rounds, "rows": rows}


def _told(row: dict) -> str:
    what = f"  T={row['T']:<5} H={row['H']:<4} {row['side']:<8} {row['mask'] or 'full':<30}"
    if "reason" in row:
        return what + row["reason"]
    return what + f"forward {row['forward']:6.1f}  backward {row['backward']:6.1f}"
