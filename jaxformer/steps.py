"""The update, as a pure function of everything it touches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array

Params = Any
Batch = Any
Metrics = dict[str, Any]
LossFn = Callable[[Params, Batch, Array], tuple[Array, Metrics]]


class TrainState(struct.PyTreeNode):
    """All that a step changes: `step` counts updates, `ema` is None where unused.

    Leaves are arrays, or whatever a `jax.tree.map` over them makes: shapes, placements.
    """

    step: Any
    params: Params
    opt_state: optax.OptState
    ema: Params | None = None


def init_state(
    params: Params, tx: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """The state before the first step."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)


def train_step(
    state: TrainState,
    batch: Batch,
    key: Array,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    ema: float | None = None,
    skip_nonfinite: bool = False,
    prepare: Callable[[Batch, Array, Array], Batch] | None = None,
) -> tuple[TrainState, Metrics]:
    """Takes one gradient step.

    Args:
      state: what the last step left.
      batch: a tree of arrays with a leading batch axis.
      key: the run's key, folded here with the step: the same for every step.
      loss_fn: `(params, batch, key) -> (loss, metrics)`, a float32 scalar and a dict of
        scalars, all means over the batch. An entry `"stats"` in the dict goes to
        `tx.update` and is not returned.
      tx: the optimizer.
      accumulate: splits the batch in so many parts, one after the other, and takes the
        mean of their gradients and metrics: every part counts alike.
      ema: decay of a running average of the parameters, kept in `state.ema`.
      skip_nonfinite: leaves everything but the step count as it was where the loss or
        the gradient is not finite, and says so by `metrics["skipped"]` = 1.
      prepare: `(batch, key, step) -> batch`, what is drawn for the whole batch before it is
        split, such as times in strata over all of it, and what depends on the step.

    Returns:
      The next state and metrics: those of `loss_fn`, `loss` and `grad_norm`.
    """
    key = jax.random.fold_in(key, state.step)
    if prepare is not None:  # No part folds this number in.
        batch = prepare(batch, jax.random.fold_in(key, accumulate), state.step)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (loss, metrics), grads = grad_fn(state.params, batch, key)
    else:
        (loss, metrics), grads = _accumulated(grad_fn, state.params, batch, key, accumulate)
    metrics = dict(metrics)
    stats = {"stats": metrics.pop("stats")} if "stats" in metrics else {}
    tx = optax.with_extra_args_support(tx)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **stats)
    params = optax.apply_updates(state.params, updates)
    average: Any = state.ema
    if ema is not None:
        average = optax.incremental_update(params, average, 1 - ema)
    grad_norm = optax.tree.norm(grads)
    metrics |= {"loss": loss, "grad_norm": grad_norm}
    new = TrainState(state.step + 1, params, opt_state, average)
    if skip_nonfinite:
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        kept = state.replace(step=state.step + 1)
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, kept)
        metrics["skipped"] = (~good).astype(jnp.float32)
    return new, metrics


def _accumulated(grad_fn, params, batch, key, parts):
    """Mean loss, metrics and gradients over `parts` of the batch; greatest stats."""

    def split(x):
        if x.shape[0] % parts:
            raise ValueError(
                f"accumulate={parts} must divide the batch, which has {x.shape[0]} rows"
            )
        # Every part takes rows from all over the batch, so that a batch that is sharded
        # over devices gives parts that are sharded over the same.
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def part(i, batch):
        (loss, metrics), grads = grad_fn(params, batch, jax.random.fold_in(key, i))
        metrics = dict(metrics)
        stats = metrics.pop("stats", {})
        metrics = {name: jnp.asarray(m, jnp.float32) for name, m in metrics.items()}
        return ((loss, metrics), grads), stats

    def body(carry, inputs):
        mean, peak = part(*inputs)
        mean = jax.tree.map(lambda a, b: a + b / parts, carry[0], mean)
        return (mean, jax.tree.map(jnp.maximum, carry[1], peak)), None

    inputs = (jnp.arange(parts), jax.tree.map(split, batch))
    shapes = jax.eval_shape(part, *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[0])
    lowest = jax.tree.map(lambda s: jnp.full(s.shape, -jnp.inf, s.dtype), shapes[1])
    (((loss, metrics), grads), stats), _ = jax.lax.scan(body, (zeros, lowest), inputs)
    return (loss, metrics | ({"stats": stats} if stats else {})), grads


def with_stats(loss: Callable, apply: Callable[..., Any]) -> LossFn:
    """Makes `loss(apply, params, batch, key)` a LossFn whose metrics hold "stats".

    They are the collection "stats" that the model's layers wrote, for an optimizer that
    looks at the forward pass (QK-clip).
    """

    def loss_fn(params, batch, key):
        seen = {}

        def spy(*args, mutable=(), **kwargs):
            out, variables = apply(*args, mutable=["stats", *mutable], **kwargs)
            seen.update(variables.get("stats", {}))
            return (out, variables) if mutable else out

        value, metrics = loss(spy, params, batch, key)
        return value, metrics | {"stats": seen}

    return loss_fn
