"""ViT at 224 pixels, training and inference, beside torch, in turns in one process.

Both do the same work. A training step is forward, loss, backward and an AdamW update;
torch's model is its own modules with `scaled_dot_product_attention`. Without torch, ours is
timed alone. A multiply-add is two operations, products of matrices alone are counted
(`models.vit.flops`), and a training step is three forward passes, whatever is made anew in
its backward pass; MFU is that rate by what the device can do: `--peak`, or known for some.
For a CPU it is the fastest of a few products of two large matrices, by XLA or torch, in the
same dtype and by the same clock. Memory is that of a process of its own, by its high-water
mark, on a CPU; and what the compiler asks for, anywhere.

`--clock cpu` counts the CPU seconds of the process, divided by its cores, and not those of
the wall: for a CPU that others use too.
"""

import argparse
import functools
import importlib.util
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxformer import steps
from jaxformer.models import vit
from jaxformer.objectives.classify import Classify
from jaxformer.optim import AdamW, Constant
from jaxformer.plan import chips

PIXELS, CLASSES = 224, 1000
PRODUCT = 1536  # Rows and columns of the matrices that tell a CPU's peak.
MODES = ("train", "infer")
BATCH = {"Ti/16": 8, "S/16": 4, "B/16": 2, "L/16": 1}  # on a CPU.
CLOCKS = {
    "wall": time.perf_counter,
    "cpu": lambda: time.process_time() / len(os.sched_getaffinity(0)),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--sizes", nargs="+", choices=BATCH, help="default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: both")
    parser.add_argument("--batch", type=int, help="default: 8 to 1 on a CPU, 256 elsewhere")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, for MFU")
    parser.add_argument("--remats", nargs="+", help="default: none dots")
    parser.add_argument("--clock", choices=CLOCKS, help="default: wall")


def run(
    rounds: int = 7,
    sizes: tuple[str, ...] = tuple(BATCH),
    modes: tuple[str, ...] = MODES,
    batch: int | None = None,
    dtype: str | None = None,
    peak: float | None = None,
    remats: tuple[str, ...] = ("none", "dots"),
    clock: str = "wall",
) -> dict:
    """Times every size in every mode; prints and returns a row a side."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    top, of_device = device_peak(peak, dtype, clock)
    rows = []
    for size in sizes:
        for mode in modes:
            count = batch or (BATCH[size] if on_cpu else 256)
            rows += measure(size, mode, count, dtype, rounds, top, remats, CLOCKS[clock])
    found = {"rounds": rounds, "pixels": PIXELS, "dtype": dtype, "clock": clock}
    return found | of_device | {"rows": rows}


def device_peak(told: float | None, dtype: str, clock: str) -> tuple[float | None, dict]:
    """Operations a second of this device, and how a run's JSON tells them.

    Those that were `told`, in 1e12, or are known of the chip in bfloat16, or that a CPU
    shows; None where it is none of these.
    """
    device = jax.devices()[0]
    top, source = None if told is None else told * 1e12, "told"
    if top is None and device.platform == "cpu":
        top, source = fastest_product(dtype, CLOCKS[clock])
    elif top is None and dtype != "float32":
        top, source = chips.peak(device.device_kind), "known"
    return top, {} if top is None else {"peak_tflops": top / 1e12, "peak_source": source}


def measure(size, mode, batch, dtype, rounds, peak, remats, clock) -> list[dict]:
    """One size in one mode: rows of ours and torch's."""
    wanted = ["ours"] if mode == "infer" else [f"ours, remat={remat}" for remat in remats]
    if dtype == "float32" and has_torch():
        wanted.append("torch")
    # Before anything of this process's own is held: they would stand side by side.
    bytes_alone = {name: process_bytes(size, mode, batch, dtype, name) for name in wanted}
    sides = {name: made(size, mode, batch, dtype, name) for name in wanted}
    image = vit.flops(vit.named(size, num_classes=CLASSES), (PIXELS, PIXELS, 3))
    work = image * batch * (3 if mode == "train" else 1)
    for step, _ in sides.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (step, _) in sides.items():
            start = clock()
            step()
            times[name].append(clock() - start)
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        row = {
            "size": size,
            "mode": mode,
            "batch": batch,
            "side": name,
            "median_ms": 1e3 * median,
            "min_ms": 1e3 * min(seconds),
            "images_per_second": batch / median,
            "gflops": work / median / 1e9,
            "mfu": None if peak is None else work / median / peak,
            "compiled_bytes": sides[name][1],
            "process_bytes": bytes_alone[name],
        }
        if "torch" in times:
            pairs = [a / b for a, b in zip(seconds, times["torch"], strict=True)]
            row["ratio_to_torch"] = statistics.median(pairs)
        rows.append(row)
        shown = {k: v for k, v in row.items() if isinstance(v, float)}
        print(f"{size} {mode} x{batch}  {name:<18}", end="")
        print("  ".join(f"{k} {v:.4g}" for k, v in shown.items()), end="")
        print(f"  process {(row['process_bytes'] or 0) / 1e6:.0f} MB")
    return rows


def made(size: str, mode: str, batch: int, dtype: str, side: str):
    """A side's step, and the bytes that its program holds, if anyone knows."""
    if side == "torch":
        return torchs(size, mode, batch), None
    return ours(size, mode, batch, dtype, side.partition("remat=")[2] or "none")


def fastest_product(dtype: str, clock: Callable[[], float]) -> tuple[float, str]:
    """FLOP/s of the fastest of some products of two large matrices, and what it was."""
    n, tries = PRODUCT, 8
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    multiply = jax.jit(jnp.matmul)
    sides = {"XLA": lambda: jax.block_until_ready(multiply(x, x))}
    if dtype == "float32" and has_torch():
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        y = torch.from_numpy(np.array(x))
        sides["torch"] = lambda: torch.matmul(y, y)
    best = {}
    for name, once in sides.items():
        once()
        for _ in range(tries):
            start = clock()
            once()
            seconds = clock() - start
            best[name] = min(best.get(name, seconds), seconds)
    side = min(best, key=lambda name: best[name])
    source = f"the fastest of {tries} products of {n} x {n} by each side, {side}'s"
    print(f"peak {2 * n**3 / best[side] / 1e9:.4g} GFLOP/s: {source}")
    return 2 * n**3 / best[side], source


def ours(size: str, mode: str, batch: int, dtype: str, remat: str) -> tuple[Callable, int]:
    """A closure that takes one step and waits for it, and the bytes its program holds."""
    model = vit.named(size, num_classes=CLASSES, remat=remat, dtype=jnp.dtype(dtype))
    key = jax.random.key(0)
    images = jax.random.normal(key, (batch, PIXELS, PIXELS, 3), jnp.dtype(dtype))
    params = nn.unbox(jax.jit(model.init)(key, images))["params"]
    if mode == "infer":
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        apply = jax.jit(model.apply).lower({"params": params}, images).compile()
        return lambda: jax.block_until_ready(apply({"params": params}, images)), held(apply)
    data = {"image": images, "label": jnp.arange(batch)}
    boxed = jax.eval_shape(model.init, key, images)["params"]
    tx = AdamW(Constant(1e-3), clip=None).make(nn.get_partition_spec(boxed), 100)
    state = [steps.init_state(params, tx)]
    loss_fn = functools.partial(Classify().loss, model.apply)
    take = functools.partial(steps.train_step, loss_fn=loss_fn, tx=tx)
    step = jax.jit(take, donate_argnums=0).lower(state[0], data, key).compile()

    def once() -> None:
        state[0], metrics = step(state[0], data, key)
        jax.block_until_ready((state[0], metrics))

    return once, held(step)


def held(compiled) -> int:
    """Bytes that a program needs at once: arguments, results and what is between."""
    m = compiled.memory_analysis()
    kept = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return kept + m.temp_size_in_bytes


def process_bytes(size, mode, batch, dtype, side) -> int | None:
    """The high-water mark of a process that takes two steps, beyond its start; on a CPU."""
    if jax.devices()[0].platform != "cpu":
        return None
    code = f"from evaluate.speed.vit import alone; alone{(size, mode, batch, dtype, side)}"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return int(out.stdout.split()[-1])


def alone(size: str, mode: str, batch: int, dtype: str, side: str) -> None:
    """Takes two steps of one side and prints the memory that they took."""
    if side == "torch":
        import torch  # pyright: ignore[reportMissingImports] # noqa: F401
    else:
        jax.block_until_ready(jnp.ones(1))
    before = high_water()
    step, _ = made(size, mode, batch, dtype, side)
    step()
    step()
    print(high_water() - before)


def high_water() -> int:
    """The most memory that this process has had, in bytes (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def has_torch() -> bool:
    """Whether torch is installed."""
    return importlib.util.find_spec("torch") is not None


def torchs(kind: str, mode: str, batch: int) -> Callable[[], None]:
    """The same in torch's own modules."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    F, size = torch.nn.functional, vit.SIZES[kind.split("/")[0]]
    D, N = size.width, size.num_heads

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (torch.nn.LayerNorm(D, eps=1e-6) for _ in range(2))
            self.qkv, self.out = torch.nn.Linear(D, 3 * D), torch.nn.Linear(D, D)
            self.up = torch.nn.Linear(D, size.mlp_dim)
            self.down = torch.nn.Linear(size.mlp_dim, D)

        def forward(self, x):
            B, T, _ = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(B, T, 3, N, D // N).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*qkv.unbind(0))
            x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = torch.nn.Conv2d(3, D, 16, 16)
            self.cls = torch.nn.Parameter(torch.zeros(1, 1, D))
            self.position = torch.nn.Parameter(torch.randn(1, (PIXELS // 16) ** 2 + 1, D))
            self.blocks = torch.nn.Sequential(*(Block() for _ in range(size.depth)))
            self.norm, self.head = torch.nn.LayerNorm(D, eps=1e-6), torch.nn.Linear(D, CLASSES)

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
            return self.head(self.norm(self.blocks(x))[:, 0])

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    images = torch.from_numpy(
        np.random.default_rng(0).normal(size=(batch, 3, PIXELS, PIXELS)).astype(np.float32)
    )
    labels = torch.arange(batch)

    def forward() -> None:
        with torch.inference_mode():
            model(images).sum().item()

    def once() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()

    return once if mode == "train" else forward
