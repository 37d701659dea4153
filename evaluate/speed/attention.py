"""Attention by three rulers: a GPU's clock, a TPU's compiler without a TPU, a CPU's clock.

`--ruler gpu` times ours beside cuDNN, XLA and tokamax; `--ruler tpu` needs libtpu but no
TPU, and reads bytes and cycles beside jax's splash (minutes; `--quick` is one shape);
`--ruler cpu` is time and memory of the path in chunks beside all logits at once. Without
`--ruler` it is gpu where there is one, else cpu.
"""

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxformer.ops.attention import attend

HEADS, HEAD = 4, 64
TIMED, SIZED = (256, 1024, 4096), (1024, 4096, 16_384)


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
    parser.add_argument("--sides", nargs="+", choices=("ours", "splash", "XLA"))
    parser.add_argument(
        "--heads", nargs="+", type=int, help="sizes of a head, of the tpu ruler"
    )
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
    return {"ruler": ruler, "rounds": rounds, **cpu(rounds, quick)}


def cpu(rounds: int, quick: bool) -> dict:
    """Forward and backward in float32: time, and bytes of temporaries."""
    short, long = (TIMED[:1], SIZED[-1:]) if quick else (TIMED, SIZED)
    timed, sized = [], []
    print(f"attention on a CPU, forward + backward, float32, {HEADS} heads of {HEAD}")
    for T in short:
        q = jax.random.normal(jax.random.key(0), (1, T, HEADS, HEAD))
        steps = {impl: _compiled(impl, T) for impl in ("auto", "chunked", "reference")}
        taken: dict[str, list[float]] = {impl: [] for impl in steps}
        for turn in range(rounds + 1):
            for impl, step in steps.items():
                start = time.perf_counter()
                jax.block_until_ready(step(q, q, q, q))
                if turn:  # The first one warms up.
                    taken[impl].append(time.perf_counter() - start)
        dense = taken["reference"]
        for impl, seconds in taken.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, dense, strict=True))
            row = {"T": T, "side": impl, "median_ms": 1e3 * statistics.median(seconds)}
            timed.append(row | {"ratio_to_dense": ratio})
            print(f"  T={T:<6} {impl:<10} {row['median_ms']:9.1f} ms  {ratio:.2f} x dense")
    for T in long:
        for impl in ("auto", "chunked", "reference"):
            stats = _compiled(impl, T).memory_analysis()
            size = stats.temp_size_in_bytes if stats else 0
            sized.append({"T": T, "side": impl, "temporaries": size})
            print(f"  T={T:<6} {impl:<10} {size / 2**20:9.1f} MiB")
    return {"timed": timed, "sized": sized}


def _compiled(impl, T: int):
    def both(q, k, v, dy):
        y, pull = jax.vjp(lambda *qkv: attend(*qkv, impl=impl), q, k, v)
        return y, pull(dy)

    x = jax.ShapeDtypeStruct((1, T, HEADS, HEAD), jnp.float32)
    return jax.jit(both).lower(x, x, x, x).compile()
