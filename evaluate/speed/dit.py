"""DiT on latents of 256 pixels, training and sampling, beside diffusers' in torch, in turns.

Both do the same work: a training step is forward, squared error of the noise, backward and
an AdamW update; sampling is Euler's method with guidance, of which every step is a forward
pass of twice the batch. Without diffusers, or in another dtype than float32, ours is timed
alone; `--sides` times one side where there is no memory for both. A multiply-add is two
operations, products of matrices alone are counted (`models.dit.flops`), and a training step
is three forward passes; MFU is that rate by what the device can do, which `--peak` tells or
`evaluate.speed.vit` knows or finds. `--clock` is as there.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evaluate.speed.vit import CLOCKS, device_peak, held
from jaxformer import steps
from jaxformer.models import dit
from jaxformer.optim import AdamW, Constant

LATENTS, CLASSES = (32, 32, 4), 1000
MODES = ("train", "sample")
SIDES = ("ours", "diffusers")
BATCH = {"S/2": 4, "B/2": 2, "L/2": 1, "XL/2": 1}  # on a CPU.
GUIDANCE = 1.5


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--sizes", nargs="+", choices=BATCH, help="default: S/2 B/2")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: both")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default: both, in turns")
    parser.add_argument("--batch", type=int, help="default: 4 to 1 on a CPU, 128 elsewhere")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, for MFU")
    parser.add_argument("--steps", type=int, help="of a sample: 2 on a CPU, 50 elsewhere")
    parser.add_argument("--remat", help="none, dots or full; default: dots")
    parser.add_argument("--clock", choices=CLOCKS, help="default: wall")


def run(
    rounds: int = 5,
    sizes: tuple[str, ...] = ("S/2", "B/2"),
    modes: tuple[str, ...] = MODES,
    batch: int | None = None,
    dtype: str | None = None,
    peak: float | None = None,
    steps: int | None = None,
    remat: str = "dots",
    clock: str = "wall",
    sides: tuple[str, ...] = SIDES,
) -> dict:
    """Times every size in every mode; prints and returns a row a side."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    steps = steps or (2 if on_cpu else 50)
    top, of_device = device_peak(peak, dtype, clock)
    rows = []
    for size in sizes:
        for mode in modes:
            count = batch or (BATCH[size] if on_cpu else 128)
            made: dict[str, tuple] = {}
            if "ours" in sides:
                made["ours"] = ours(size, mode, count, dtype, steps, remat)
            if "diffusers" in sides and dtype == "float32":
                theirs = torchs(size, mode, count, steps)
                made |= {} if theirs is None else {"diffusers": (theirs, None)}
            rows += timed(size, mode, count, steps, made, rounds, top, CLOCKS[clock])
    found: dict[str, Any] = {"rounds": rounds, "latents": LATENTS, "dtype": dtype}
    found |= {"steps": steps, "clock": clock}
    return found | of_device | {"rows": rows}


def timed(size, mode, batch, steps, sides, rounds, peak, clock) -> list[dict]:
    """Every side in turn, `rounds` times; a row a side."""
    passes = 3 if mode == "train" else 2 * steps
    work = dit.flops(dit.named(size, learned_variance=True), LATENTS) * batch * passes
    for step, _ in sides.values():
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
        row: dict[str, Any] = {"size": size, "mode": mode, "batch": batch, "side": name}
        row |= {
            "median_ms": 1e3 * median,
            "min_ms": 1e3 * min(seconds),
            "images_per_second": batch / median,
            "gflops": work / median / 1e9,
            "mfu": None if peak is None else work / median / peak,
            "compiled_bytes": sides[name][1],
        }
        if len(times) == 2:
            pairs = [a / b for a, b in zip(seconds, times["diffusers"], strict=True)]
            row["ratio_to_diffusers"] = statistics.median(pairs)
        rows.append(row)
        shown = {k: v for k, v in row.items() if isinstance(v, float)}
        print(f"{size} {mode} x{batch}  {name:<10}", end="")
        print("  ".join(f"{k} {v:.4g}" for k, v in shown.items()))
    return rows


def ours(size, mode, batch, dtype, count, remat) -> tuple[Callable, int]:
    """A closure that takes one step, or a sample, and waits; the bytes its program holds."""
    model = dit.named(size, learned_variance=True, remat=remat, dtype=jnp.dtype(dtype))
    key = jax.random.key(0)
    x = jax.random.normal(key, (batch, *LATENTS))
    t, label = jnp.full(batch, 0.5), jnp.arange(batch) % CLASSES
    boxed = jax.eval_shape(model.init, key, x, t, label)["params"]
    params = nn.unbox(jax.jit(model.init)(key, x, t, label))["params"]
    if mode == "sample":
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        both = jnp.concatenate([label, jnp.full_like(label, CLASSES)])

        def sample(params, x):
            def euler(x, t):
                twice = jnp.concatenate([x, x])
                out: Any = model.apply({"params": params}, twice, jnp.full(2 * batch, t), both)
                a, b = jnp.split(out[..., : x.shape[-1]], 2)
                return x - (b + GUIDANCE * (a - b)) / count, None

            return jax.lax.scan(euler, x, 1 - jnp.arange(count) / count)[0]

        run = jax.jit(sample).lower(params, x).compile()
        return lambda: jax.block_until_ready(run(params, x)), held(run)

    def loss_fn(params, batch, key):
        noise = jax.random.normal(key, x.shape)
        out: Any = model.apply({"params": params}, batch["x"] + noise, t, batch["label"])
        return ((out[..., : x.shape[-1]] - noise) ** 2).mean(), {}

    tx = AdamW(Constant(1e-4), decay=0.0, clip=None).make(nn.get_partition_spec(boxed), 100)
    state, data = [steps.init_state(params, tx)], {"x": x, "label": label}
    take = functools.partial(steps.train_step, loss_fn=loss_fn, tx=tx)
    step = jax.jit(take, donate_argnums=0).lower(state[0], data, key).compile()

    def once() -> None:
        state[0], metrics = step(state[0], data, key)
        jax.block_until_ready((state[0], metrics))

    return once, held(step)


def torchs(size, mode, batch, count) -> Callable | None:
    """The same step by diffusers' `DiTTransformer2DModel`; None where there is no diffusers."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from diffusers import DiTTransformer2DModel  # pyright: ignore
    except ImportError:
        return None
    name, patch = size.split("/")
    own = dit.SIZES[name]
    Y, _, C = LATENTS
    model = DiTTransformer2DModel(
        num_attention_heads=own.num_heads,
        attention_head_dim=own.width // own.num_heads,
        num_layers=own.depth,
        in_channels=C,
        out_channels=2 * C,
        sample_size=Y,
        patch_size=int(patch),
    )
    shape = (batch, C, Y, Y)
    draw = np.random.default_rng(0)
    x = torch.from_numpy(draw.normal(size=shape).astype(np.float32))
    label = torch.arange(batch) % CLASSES
    t = torch.full((batch,), 500)
    if mode == "sample":
        model.eval()

        def sample() -> None:
            with torch.inference_mode():
                at, both = x, torch.cat([label, torch.full_like(label, CLASSES)])
                for i in range(count):
                    when = torch.full((2 * batch,), 1000 - 1000 * i // count - 1)
                    out = model(torch.cat([at, at]), timestep=when, class_labels=both).sample
                    a, b = out[:, :C].chunk(2)
                    at = at - (b + GUIDANCE * (a - b)) / count
                at.sum().item()

        return sample
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0)

    def once() -> None:
        optimizer.zero_grad()
        noise = torch.randn(shape)
        out = model(x + noise, timestep=t, class_labels=label).sample
        loss = ((out[:, :C] - noise) ** 2).mean()
        loss.backward()
        optimizer.step()
        loss.item()

    return once
