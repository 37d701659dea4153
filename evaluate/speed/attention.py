"""Attention by three rulers: a GPU's clock, a TPU's compiler without a TPU, a CPU's clock.

`--ruler gpu` times ours beside cuDNN, XLA and tokamax; `--ruler tpu` needs libtpu but no
TPU, and reads bytes and cycles beside jax's splash (minutes; `--quick` is one shape);
`--ruler cpu` is time and memory of the path in chunks beside all logits at once, memory by
the high-water mark of a process of its own and, at lengths where dense attention would not
fit, by what the compiler asks for; `--clock cpu` is as in `evaluate.speed vit`. Without
`--ruler` it is gpu where there is one, else cpu.
"""

import argparse
import importlib.metadata
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from evaluate.speed.vit import CLOCKS, high_water
from jaxformer.ops.attention import attend

HEADS, HEAD = 4, 64
TIMED, SIZED = (256, 1024, 4096), (1024, 4096, 16_384)
SIDES = ("auto", "chunked", "reference")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only this benchmark has."""
    parser.add_argument("--ruler", choices=("gpu", "tpu", "cpu"))
    parser.add_argument("--quick", action="store_true", help="one shape of each kind")
    parser.add_argument(
        "--chips", nargs="+", choices=("v5e", "v5p", "v6e"), help="of the tpu ruler"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("layers", "kernels", "masks"),
        help="of the tpu ruler, which takes hours for all",
    )
    parser.add_argument("--sides", nargs="+", choices=("ours", "splash", "flash", "XLA"))
    parser.add_argument(
        "--heads", nargs="+", type=int, help="sizes of a head, of the tpu ruler"
    )
    parser.add_argument("--clock", choices=CLOCKS, help="of the cpu ruler; default: wall")
    layers = parser.add_argument_group("which layers of the tpu ruler; all, if not told")
    layers.add_argument("--lengths", nargs="+", type=int)
    layers.add_argument(
        "--ways",
        nargs="+",
        choices=("forward", "backward", "fused-forward", "fused-backward"),
        help="fused: with QK-norm and rotary",
    )


def run(
    rounds: int = 5,
    ruler: str | None = None,
    quick: bool = False,
    chips: Sequence[str] = ("v5e", "v5p", "v6e"),
    clock: str = "wall",
    **which,
) -> dict:
    """Measures by one ruler and prints its table."""
    ruler = ruler or ("gpu" if jax.default_backend() == "gpu" else "cpu")
    if ruler == "gpu":
        from evaluate.speed import gpu

        if jax.default_backend() != "gpu":
            raise SystemExit("--ruler gpu needs a GPU that jax sees; tpu and cpu need none")
        return {"ruler": ruler, **gpu.run(rounds, quick)}
    jax.config.update("jax_platforms", "cpu")  # Also where there is more.
    if ruler == "tpu":
        from evaluate.speed import attention_tpu

        compiler = {"libtpu": importlib.metadata.version("libtpu"), "chips": list(chips)}
        return {"ruler": ruler, **compiler, **attention_tpu.run(chips, quick, **which)}
    return {"ruler": ruler, "rounds": rounds, "clock": clock, **cpu(rounds, quick, clock)}


def cpu(rounds: int, quick: bool, clock: str = "wall") -> dict:
    """Forward and backward in float32: time, bytes of a process, and of temporaries."""
    short, long = (TIMED[:1], SIZED[-1:]) if quick else (TIMED, SIZED)
    now = CLOCKS[clock]
    timed, sized = [], []
    print(f"attention on a CPU, forward + backward, float32, {HEADS} heads of {HEAD}")
    for T in short:
        q = jax.random.normal(jax.random.key(0), (1, T, HEADS, HEAD))
        steps = {impl: _compiled(impl, T) for impl in SIDES}
        taken: dict[str, list[float]] = {impl: [] for impl in steps}
        for turn in range(rounds + 1):
            for impl, step in steps.items():
                start = now()
                jax.block_until_ready(step(q, q, q, q))
                if turn:  # The first one warms up.
                    taken[impl].append(now() - start)
        dense = taken["reference"]
        for impl, seconds in taken.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, dense, strict=True))
            row = {"T": T, "side": impl, "median_ms": 1e3 * statistics.median(seconds)}
            row |= {"ratio_to_dense": ratio, "process": None if quick else process(impl, T)}
            timed.append(row)
            told = "" if quick else f"  {row['process'] / 2**20:7.1f} MiB of a process"
            told = f"{row['median_ms']:9.1f} ms  {ratio:.2f} x dense{told}"
            print(f"  T={T:<6} {impl:<10} {told}")
    for T in long:
        for impl in SIDES:
            stats = _compiled(impl, T).memory_analysis()
            size = stats.temp_size_in_bytes if stats else 0
            sized.append({"T": T, "side": impl, "temporaries": size})
            print(f"  T={T:<6} {impl:<10} {size / 2**20:9.1f} MiB of temporaries")
    return {"timed": timed, "sized": sized}


def process(impl: str, T: int) -> int:
    """The high-water mark of a process that takes two steps, beyond what it held before."""
    code = f"from evaluate.speed.attention import alone; alone({impl!r}, {T})"
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def alone(impl: str, T: int) -> None:
    """Takes two steps of one side and prints the memory that they took."""
    jax.config.update("jax_platforms", "cpu")
    q, step = jax.random.normal(jax.random.key(0), (1, T, HEADS, HEAD)), _compiled(impl, T)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # What compiling took is forgotten.
    before = high_water()
    for _ in range(2):
        jax.block_until_ready(step(q, q, q, q))
    print(high_water() - before)


def _compiled(impl, T: int):
    def both(q, k, v, dy):
        y, pull = jax.vjp(lambda *qkv: attend(*qkv, impl=impl), q, k, v)
        return y, pull(dy)

    x = jax.ShapeDtypeStruct((1, T, HEADS, HEAD), jnp.float32)
    return jax.jit(both).lower(x, x, x, x).compile()
