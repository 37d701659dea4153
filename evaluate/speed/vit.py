"""One ViT training step (AdamW, float32) beside torch's, in turns in one process.

Both do the same work: forward, loss, backward, update of ViT-Ti/16 at 224 pixels with a
batch of 8 and 1,000 classes. torch's is its own modules with
`scaled_dot_product_attention`; without torch, ours is timed alone.
"""

import functools
import os
import statistics
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

SIZE, PIXELS, BATCH, CLASSES = "Ti/16", 224, 8, 1000


def run(rounds: int = 15) -> dict:
    """Times `rounds` steps of each and prints medians, quartiles and the ratio."""
    sides = {"ours, remat=dots": ours("dots"), "ours, remat=none": ours("none")}
    theirs = torchs()
    if theirs is not None:
        sides["torch"] = theirs
    for step in sides.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    rows = {}
    print(f"ViT-{SIZE}, {PIXELS} px, batch {BATCH}, float32, training step, {rounds} rounds")
    for name, seconds in times.items():
        rows[name] = {
            "median_ms": 1e3 * statistics.median(seconds),
            "min_ms": 1e3 * min(seconds),
            "images_per_second": BATCH / statistics.median(seconds),
        }
        if "torch" in times:
            pairs = [a / b for a, b in zip(seconds, times["torch"], strict=True)]
            rows[name]["ratio_to_torch"] = statistics.median(pairs)
        print("  " + name.ljust(18), "  ".join(f"{k} {v:.4g}" for k, v in rows[name].items()))
    return {"rounds": rounds, "rows": rows}


def ours(remat: str) -> Callable[[], None]:
    """A closure that takes one step and waits for it."""
    model = vit.named(SIZE, num_classes=CLASSES, remat=remat)
    key = jax.random.key(0)
    images = jax.random.normal(key, (BATCH, PIXELS, PIXELS, 3))
    batch = {"image": images, "label": jnp.arange(BATCH)}
    boxed = jax.eval_shape(model.init, key, images)["params"]
    tx = AdamW(Constant(1e-3), clip=None).make(nn.get_partition_spec(boxed), 100)
    params = nn.unbox(jax.jit(model.init)(key, images))["params"]
    state = [steps.init_state(params, tx)]
    loss_fn = functools.partial(Classify().loss, model.apply)
    step = jax.jit(
        functools.partial(steps.train_step, loss_fn=loss_fn, tx=tx), donate_argnums=0
    )

    def once() -> None:
        state[0], metrics = step(state[0], batch, key)
        jax.block_until_ready((state[0], metrics))

    return once


def torchs() -> Callable[[], None] | None:
    """The same in torch's own modules, or None where torch is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    F, size = torch.nn.functional, vit.SIZES[SIZE.split("/")[0]]
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
    count = sum(p.numel() for p in model.parameters())
    assert count == 5_717_416, f"torch's model has {count} parameters"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    images = torch.from_numpy(
        np.random.default_rng(0).normal(size=(BATCH, 3, PIXELS, PIXELS)).astype(np.float32)
    )
    labels = torch.arange(BATCH)

    def once() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()

    return once
