"""InceptionV3: who looks at pictures when a Frechet distance is to be one that others have.

Source: Szegedy et al. 2015 (arXiv 1512.00567), with torchvision's facts. As an encoder alone:
its batch norms hold the statistics of its training, which nothing here changes.
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.convolve import fan_in
from jaxformer.layers.einsum import Einsum
from jaxformer.sharding import constrain, partitioned

SMALLEST = 75  # rows or columns of which something is left at the end.
ONES, ZEROS = nn.initializers.ones, nn.initializers.zeros


class Step(NamedTuple):
    """A convolution of `size`, (rows, columns), to `width` channels, under torch's name.

    `same` keeps the size of the picture, else it is cut by what has no whole neighbourhood.
    """

    name: str
    width: int
    size: tuple[int, int]
    stride: int = 1
    same: bool = True


Branch = tuple[Step | tuple[Step, ...], ...]  # A tuple of steps: side by side.


def chain(name: str, *steps: tuple) -> Branch:
    """Steps that are called `name` and a number each, or `name` alone where it is one."""
    if len(steps) == 1:
        return (Step(name, *steps[0]),)
    return tuple(Step(f"{name}_{i + 1}", *step) for i, step in enumerate(steps))


def small(pooled: int) -> tuple[Branch, ...]:
    """The blocks at 1/8 of the size; their last branch is that of the pool."""
    return (
        chain("branch1x1", (64, (1, 1))),
        chain("branch5x5", (48, (1, 1)), (64, (5, 5))),
        chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
        chain("branch_pool", (pooled, (1, 1))),
    )


def long(width: int) -> tuple[Branch, ...]:
    """The blocks at 1/16, of rows and columns of seven."""
    row, column, wide = (width, (1, 7)), (width, (7, 1)), (192, (1, 7))
    return (
        chain("branch1x1", (192, (1, 1))),
        chain("branch7x7", (width, (1, 1)), row, (192, (7, 1))),
        chain("branch7x7dbl", (width, (1, 1)), column, row, column, wide),
        chain("branch_pool", (192, (1, 1))),
    )


def _sides(name: str) -> tuple[Step, Step]:
    return Step(f"{name}a", 384, (1, 3)), Step(f"{name}b", 384, (3, 1))


WIDE: tuple[Branch, ...] = (  # The blocks at 1/32.
    chain("branch1x1", (320, (1, 1))),
    (Step("branch3x3_1", 384, (1, 1)), _sides("branch3x3_2")),
    (
        Step("branch3x3dbl_1", 448, (1, 1)),
        Step("branch3x3dbl_2", 384, (3, 3)),
        _sides("branch3x3dbl_3"),
    ),
    chain("branch_pool", (192, (1, 1))),
)
HALF = (2, False)
STEM: tuple[Step | None, ...] = (  # None: a maximum of 3 x 3, half the size.
    Step("Conv2d_1a_3x3", 32, (3, 3), *HALF),
    Step("Conv2d_2a_3x3", 32, (3, 3), 1, False),
    Step("Conv2d_2b_3x3", 64, (3, 3)),
    None,
    Step("Conv2d_3b_1x1", 80, (1, 1)),
    Step("Conv2d_4a_3x3", 192, (3, 3), 1, False),
    None,
)
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": small(32),
    "Mixed_5c": small(64),
    "Mixed_5d": small(64),
    "Mixed_6a": (
        chain("branch3x3", (384, (3, 3), *HALF)),
        chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3), *HALF)),
    ),
    "Mixed_6b": long(128),
    "Mixed_6c": long(160),
    "Mixed_6d": long(160),
    "Mixed_6e": long(192),
    "Mixed_7a": (
        chain("branch3x3", (192, (1, 1)), (320, (3, 3), *HALF)),
        chain("branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), *HALF)),
    ),
    "Mixed_7b": WIDE,
    "Mixed_7c": WIDE,
}


HALVING = ("Mixed_6a", "Mixed_7a")


class Convolve(nn.Module):
    """A convolution without bias, a batch norm of held statistics, and what is above 0."""

    step: Step
    epsilon: float = 1e-3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B y x O"]:
        _, width, size, stride, same = self.step

        def vector(name: str, init) -> Array:
            return self.param(name, partitioned(init, "O"), (width,))

        kernel = self.param("kernel", partitioned(fan_in, "PQCO"), (*size, x.shape[-1], width))
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            jnp.asarray(kernel, self.dtype),
            (stride, stride),
            [(n // 2, n // 2) if same else (0, 0) for n in size],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        mean, variance = vector("mean", ZEROS), vector("variance", ONES)
        scale = vector("scale", ONES) * jax.lax.rsqrt(variance + self.epsilon)
        y = (
            y * scale[None, None, None]
            + (vector("bias", ZEROS) - mean * scale)[None, None, None]
        )
        return constrain(jax.nn.relu(y).astype(self.dtype), "BYXC")


def highest(x: Float[Array, "B Y X C"], same: bool = False) -> Float[Array, "B y x C"]:
    """The maximum of each 3 x 3, at every second place, or at every place where `same`."""
    stride, pad = (1, (1, 1)) if same else (2, (0, 0))
    low, around = -jnp.inf, ((0, 0), pad, pad, (0, 0))
    return jax.lax.reduce_window(
        x, low, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), around
    )


def average(x: Float[Array, "B Y X C"], beyond: bool) -> Float[Array, "B Y X C"]:
    """The mean of each 3 x 3; what is beyond the edge counts as 0, or not at all."""
    window = (1, 3, 3, 1), (1, 1, 1, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, *window)
    if beyond:
        return total / 9
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return total / jax.lax.reduce_window(ones, 0.0, jax.lax.add, *window)


class Mixed(nn.Module):
    """Branches side by side, their channels one after the other; the last is of a pool.

    `pool` is "average" (what is beyond the edge counts as 0), "inner" (it does not count) or
    "highest"; or "half", of a block that halves the picture: a maximum after all branches.
    """

    branches: tuple[Branch, ...]
    pool: Literal["average", "inner", "highest", "half"] = "average"
    epsilon: float = 1e-3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B y x O"]:
        def run(x, branch: Branch):
            for steps in branch:
                made = [
                    Convolve(step, self.epsilon, self.dtype, name=step.name)(x)
                    for step in ((steps,) if isinstance(steps, Step) else steps)
                ]
                x = jnp.concatenate(made, -1)
            return x

        *branches, last = self.branches
        if self.pool == "half":
            return jnp.concatenate([*(run(x, b) for b in self.branches), highest(x)], -1)
        same = self.pool == "highest"
        pooled = highest(x, True) if same else average(x, self.pool == "average")
        return jnp.concatenate([*(run(x, b) for b in branches), run(pooled, last)], -1)


class InceptionV3(nn.Module):
    """Pictures `[B, Y, X, 3]` of -1 to 1, of 299 pixels as a rule, to classes.

    `features` are the means of the last block's 2,048 channels, which Frechet and kernel
    distances are of. With `fid` it is the network of the original FID (1,008 classes, from
    TensorFlow): means count no place beyond the edge, and the last block's pool is a maximum.
    Without, it is torchvision's and timm's. `divide` makes all widths smaller, for tests.
    """

    num_classes: int = 1000  # 0: features alone.
    fid: bool = False
    epsilon: float = 1e-3
    divide: int = 1
    dtype: DTypeLike = jnp.float32

    def setup(self):
        def narrow(step: Step) -> Step:
            return step._replace(width=step.width // self.divide)

        def narrowed(steps):
            return narrow(steps) if isinstance(steps, Step) else tuple(map(narrow, steps))

        how = (self.epsilon, self.dtype)
        for step in filter(None, STEM):
            setattr(self, step.name, Convolve(narrow(step), *how))
        for name, branches in BLOCKS.items():
            narrower = tuple(tuple(map(narrowed, branch)) for branch in branches)
            setattr(self, name, Mixed(narrower, self.pool(name), *how))
        if self.num_classes:
            self.fc = Einsum("BD,DV->BV", {"V": self.num_classes}, True, self.dtype)

    def pool(self, block: str) -> Any:
        """How a block pools."""
        if block in HALVING:
            return "half"
        if not self.fid:
            return "average"
        return "highest" if block == "Mixed_7c" else "inner"

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V"]:
        x = self.features(x)
        return self.fc(x).astype(jnp.float32) if self.num_classes else x

    def features(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B D"]:
        """What its classifier reads.

        Raises:
          ValueError: a picture of which nothing would be left.
        """
        if min(x.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"pictures of {x.shape[1]} x {x.shape[2]} are too small for InceptionV3; make "
                f"them {SMALLEST} pixels or larger, 299 as it was trained"
            )
        for step in STEM:
            x = highest(x) if step is None else getattr(self, step.name)(x)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((1, 2)).astype(jnp.float32)
