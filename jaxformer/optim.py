"""Optimizer recipes: learning-rate schedules, AdamW, and Muon for the hidden matrices.

A recipe is a frozen dataclass of numbers. `make(axes, steps)` turns it into an optax
transformation, where `axes` is the tree of parameters with a `PartitionSpec` of logical
axes at each leaf, and `steps` the length of the run. Log the rate with
`recipe.rate.make(steps)`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jaxformer.errors import InputError
from jaxformer.muon import (
    COEFFICIENTS,
    clip_qk,
    is_numbers,
    muon_dimensions,
    orthogonalize,
    refuse_qk_norm,
    scale_by_muon,
)
from jaxformer.sharding import names

Steps = int | float
"""A part of the run: an int is that many steps, a float in [0, 1] a fraction of it."""


@runtime_checkable
class Schedule(Protocol):
    """What a recipe asks of a rate. `make(steps)(0)` is the first update's."""

    def make(self, steps: int) -> optax.Schedule: ...


@dataclasses.dataclass(frozen=True)
class Constant:
    """From 0 to `peak` in a line over `warmup`, then `peak`.

    Example:
      >>> rate = Constant(3e-4, warmup=0.1).make(steps=100)
      >>> [round(float(rate(step)), 6) for step in (0, 5, 10, 100)]
      [0.0, 0.00015, 0.0003, 0.0003]
    """

    peak: float
    warmup: Steps = 0

    def make(self, steps: int) -> optax.Schedule:
        (warmup,) = _lengths(steps, warmup=self.warmup)
        return lambda step: self.peak * _ramp(step, warmup)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """From 0 to `peak` in a line over `warmup`, then half a cosine down to `floor`.

    `floor` is a rate, not a part of `peak`.
    Source: Loshchilov and Hutter 2017 (arXiv 1608.03983).
    """

    peak: float
    warmup: Steps = 0.05
    floor: float = 0.0

    def make(self, steps: int) -> optax.Schedule:
        (warmup,) = _lengths(steps, warmup=self.warmup)
        _check_floor(self.floor, self.peak)

        def rate(step):
            left = _ramp(steps - step, steps - warmup)
            high = 0.5 + 0.5 * jnp.cos(jnp.pi * (1 - left))
            decayed = self.peak * high + self.floor * (1 - high)
            return decayed * _ramp(step, warmup)

        return rate


@dataclasses.dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay: lines from 0 to `peak`, along it, and at last to `floor`.

    A run can be lengthened from any checkpoint of the stable part.
    Source: Hu et al. 2024 (MiniCPM, arXiv 2404.06395); a line as in Hägele et al. 2024
    (arXiv 2405.18392). `floor` is a rate, not a part of `peak`.
    """

    peak: float
    warmup: Steps = 0.05
    decay: Steps = 0.2
    floor: float = 0.0

    def make(self, steps: int) -> optax.Schedule:
        warmup, decay = _lengths(steps, warmup=self.warmup, decay=self.decay)
        _check_floor(self.floor, self.peak)

        def rate(step):
            high = _ramp(steps - step, decay)
            decayed = self.peak * high + self.floor * (1 - high)
            return decayed * _ramp(step, warmup)

        return rate


@dataclasses.dataclass(frozen=True)
class Rsqrt:
    """From 0 to `peak` over `warmup`, then as one over the root of time, and down to 0.

    `peak * sqrt(timescale / (timescale + step - warmup))`, times a line from 1 to 0
    over the last `cooldown`; before that it knows no end, so a run can be lengthened.
    Source: Zhai et al. 2022 (arXiv 2106.04560).
    """

    peak: float
    warmup: Steps = 0.05
    timescale: Steps = 10_000
    cooldown: Steps = 0.1

    def make(self, steps: int) -> optax.Schedule:
        warmup, cooldown = _lengths(steps, warmup=self.warmup, cooldown=self.cooldown)
        timescale = max(1, _length("timescale", self.timescale, steps))

        def rate(step):
            late = jnp.maximum(step - warmup, 0)
            slow = self.peak * jnp.sqrt(timescale / (timescale + late))
            return slow * _ramp(step, warmup) * _ramp(steps - step, cooldown)

        return rate


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay.

    `update = -rate * (m / (sqrt(v) + eps) + decay * param)`, with `m` and `v` the means
    of the gradient and of its square, freed of their bias. Decay acts on `kernel` and
    `embedding` leaves, not on `bias` and `scale`. Gradients with a global norm over
    `clip` are first scaled down to it.
    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), with the rate times the decay
    as in PyTorch.

    Example:
      >>> params = {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
      >>> axes = {"head": {"kernel": PartitionSpec("embed", "vocab"),
      ...                  "bias": PartitionSpec("vocab")}}
      >>> tx = AdamW(Constant(0.1), decay=0.5).make(axes, steps=10)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> round(float(updates["head"]["kernel"][0, 0]), 3)
      -0.15
    """

    rate: Schedule
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.1
    clip: float | None = 1.0  # None: gradients as they are.
    mu_dtype: DTypeLike | None = None  # Of the mean gradient. None: as the parameters.

    def make(self, axes: PyTree, steps: int) -> optax.GradientTransformationExtraArgs:
        means = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype)
        return optax.chain(
            _clip(self.clip),
            means,
            optax.add_decayed_weights(self.decay, _decayed(axes)),
            optax.scale_by_learning_rate(self.rate.make(steps)),
        )


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """The numbers of `muon.orthogonalize`, and what they mean is told there."""

    steps: int = 5
    dtype: DTypeLike = "bfloat16"
    precision: str | None = None
    coefficients: tuple[float, float, float] = COEFFICIENTS


@dataclasses.dataclass(frozen=True)
class Rest:
    """AdamW for what Muon does not take; its rate is `ratio` times Muon's."""

    ratio: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    decay: float = 0.1


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon for the hidden matrices, AdamW for the rest, by the logical axes of each.

    `update = -rate * (scale * orthogonalize(m) + decay * param)` on every leaf that has
    `muon_dimensions`, whatever its rank. The defaults are Moonlight's: updates have the
    size of AdamW's, so one rate and one decay serve both parts. For Jordan's, set
    `scale="shape"`, a rate near 0.02 and a `rest.ratio` near 0.015.

    With `qk_clip` (Kimi K2: 100) this is MuonClip, and the update function needs
    `stats`: see `muon.clip_qk`. Sharded parameters are updated as unsharded ones are,
    on a mesh of Auto axes.
    Sources: Jordan 2024, arXiv 2502.16982, arXiv 2507.20534.

    Example:
      >>> params = {"up": {"kernel": jnp.eye(4, 8), "bias": jnp.zeros(8)}}
      >>> axes = {"up": {"kernel": PartitionSpec("embed", "mlp"),
      ...                "bias": PartitionSpec("mlp")}}
      >>> tx = Muon(Cosine(1e-3, warmup=100)).make(axes, steps=1000)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(jnp.shape, updates)
      {'up': {'bias': (8,), 'kernel': (4, 8)}}
    """

    rate: Schedule
    momentum: float = 0.95
    nesterov: bool = True
    decay: float = 0.1
    scale: Literal["rms", "shape"] = "rms"
    per_head: bool = False
    newton_schulz: NewtonSchulz = NewtonSchulz()
    rest: Rest = Rest()
    clip: float | None = 1.0  # Global norm of the gradient. None: as it is.
    qk_clip: float | None = None  # Largest attention logit that a head may keep.
    mu_dtype: DTypeLike | None = None  # Of both mean gradients. None: as the parameters.

    def make(self, axes: PyTree, steps: int) -> optax.GradientTransformationExtraArgs:
        rate, rest = self.rate.make(steps), self.rest
        dimensions = muon_dimensions(axes, per_head=self.per_head)
        last = optax.identity()
        if self.qk_clip is not None:
            refuse_qk_norm(axes)
            last = clip_qk(self.qk_clip)
        hidden = optax.chain(
            scale_by_muon(
                dimensions,
                momentum=self.momentum,
                nesterov=self.nesterov,
                scale=self.scale,
                mu_dtype=self.mu_dtype,
                orthogonalize=partial(orthogonalize, **vars(self.newton_schulz)),
                axes=axes,
            ),
            optax.add_decayed_weights(self.decay),
            optax.scale_by_learning_rate(rate),
        )
        adamw = AdamW(
            _Scaled(self.rate, rest.ratio),
            rest.b1,
            rest.b2,
            rest.eps,
            rest.decay,
            clip=None,  # Clipped already, with the norm of all leaves.
            mu_dtype=self.mu_dtype,
        ).make(axes, steps)
        owners = jax.tree.map(
            lambda numbers: "adamw" if numbers is None else "muon",
            dimensions,
            is_leaf=is_numbers,
        )
        parts = optax.partition({"muon": hidden, "adamw": adamw}, owners)
        return optax.chain(_clip(self.clip), parts, last)


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """A schedule times a number."""

    rate: Schedule
    ratio: float

    def make(self, steps: int) -> optax.Schedule:
        rate = self.rate.make(steps)
        return lambda step: self.ratio * rate(step)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Another recipe for the parameters under `names` alone; the others stay as they are.

    `Parts(AdamW(rate), ("connector",))` is LLaVA's first stage, `("connector", "language")`
    its second. There is state for what trains and for nothing else. `stopped` makes a loss
    that asks for no other gradients, which a training step then does not compute.

    Raises:
      InputError: from `make`, a name that no parameter has.
    """

    recipe: Any
    names: tuple[str, ...]  # Paths, or their first parts: `language/stack`.

    @property
    def rate(self) -> Schedule:
        """The recipe's."""
        return self.recipe.rate

    def make(self, axes: PyTree, steps: int) -> optax.GradientTransformationExtraArgs:
        paths = traverse_util.flatten_dict(axes, sep="/")
        for name in self.names:
            if not any(under(path, name) for path in paths):
                tops = ", ".join(sorted({path.split("/")[0] for path in paths}))
                raise InputError(f"names: no parameter is under {name!r}; there are {tops}")
        inner = optax.with_extra_args_support(self.recipe.make(self._own(axes), steps))

        def update(updates, state, params=None, **extra):
            own = None if params is None else self._own(params)
            made, state = inner.update(self._own(updates), state, own, **extra)
            made = traverse_util.flatten_dict(made, sep="/")
            zeros = jax.tree.map(jnp.zeros_like, traverse_util.flatten_dict(updates, sep="/"))
            return traverse_util.unflatten_dict(zeros | made, sep="/"), state

        return optax.GradientTransformationExtraArgs(
            lambda params: inner.init(self._own(params)), update
        )

    def stopped(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """`loss(params, ...)` whose gradient is 0 where nothing trains."""

        def stopped(params, *inputs):
            flat = traverse_util.flatten_dict(params, sep="/")
            flat = {
                p: x if self._trains(p) else jax.lax.stop_gradient(x) for p, x in flat.items()
            }
            return loss(traverse_util.unflatten_dict(flat, sep="/"), *inputs)

        return stopped

    def _trains(self, path: str) -> bool:
        return any(under(path, name) for name in self.names)

    def _own(self, tree: PyTree) -> PyTree:
        flat = traverse_util.flatten_dict(tree, sep="/")
        own = {path: x for path, x in flat.items() if self._trains(path)}
        return traverse_util.unflatten_dict(own, sep="/")


def under(path: str, name: str) -> bool:
    """Whether a path is `name`, or goes on from it."""
    return path == name or path.startswith(f"{name}/")


def _clip(norm: float | None) -> optax.GradientTransformation:
    return optax.identity() if norm is None else optax.clip_by_global_norm(norm)


def _decayed(axes: PyTree) -> PyTree[bool]:
    """True at the leaves that weight decay acts on."""
    return jax.tree.map_with_path(
        lambda path, _: names(path)[-1] in ("kernel", "embedding"),
        axes,
        is_leaf=lambda x: x is None or isinstance(x, PartitionSpec),
    )


def _ramp(step, length: int) -> Array:
    """From 0 at step 0 to 1 at `length` and after, in a line; 1 throughout without one."""
    return jnp.clip(step / length if length else jnp.ones_like(step), 0.0, 1.0)


def _length(name: str, length: Steps, steps: int) -> int:
    if isinstance(length, float):
        if not 0 <= length <= 1:
            raise InputError(
                f"{name}={length} is no fraction of the run; write a float in [0, 1], "
                "or an int for a number of steps"
            )
        return round(length * steps)
    if length < 0:
        raise InputError(f"{name}={length} must not be negative")
    return length


def _lengths(steps: int, **parts: Steps) -> list[int]:
    """Each part in steps; together they fit into the run."""
    lengths = [_length(name, length, steps) for name, length in parts.items()]
    if sum(lengths) > steps:
        told = " and ".join(f"{name}={length}" for name, length in parts.items())
        raise InputError(
            f"{told} do not fit into a run of {steps} steps; shorten them, or give "
            "fractions of the run"
        )
    return lengths


def _check_floor(floor: float, peak: float) -> None:
    if not 0 <= floor <= peak:
        raise InputError(f"floor={floor} is a rate, and must lie between 0 and peak={peak}")
