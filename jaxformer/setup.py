"""From an experiment to compiled functions and the places of their arrays."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformer import sharding, steps
from jaxformer.errors import InputError
from jaxformer.experiment import Experiment
from jaxformer.lora import plain


@dataclasses.dataclass(frozen=True)
class Setup:
    """An experiment on a mesh. Functions are compiled at their first call.

    `inputs` are what the model is called with, by shape and dtype, batch axis first.
    `state` holds the shapes, dtypes and places of `steps.TrainState`; `init(key)` makes
    it; `step(state, batch, key)` takes a step and gives the old state's memory away;
    `lower(batch)` lowers it for a batch of these shapes, on devices that need not be there;
    `measure(params, batch, key)` gives the metrics of one evaluation batch.
    """

    inputs: tuple[Any, ...]
    mesh: Mesh
    rules: sharding.Rules
    batch: NamedSharding
    explanation: sharding.Explanation
    state: steps.TrainState
    init: Callable[[jax.Array], steps.TrainState]
    step: Callable[..., tuple[steps.TrainState, dict[str, jax.Array]]]
    lower: Callable[[Any], jax.stages.Lowered]
    measure: Callable[..., Any]

    @property
    def batch_ways(self) -> int:
        """Over how many devices a batch is split."""
        return sharding.ways(self.mesh, self.batch.spec[0])


def setup(experiment: Experiment, inputs: Sequence[Any], devices=None) -> Setup:
    """Lays an experiment out on its mesh; nothing is compiled or allocated yet.

    Args:
      experiment: what to run.
      inputs: what the model is called with, by shape and dtype, batch axis first.
      devices: all that JAX sees, if not given.

    Raises:
      InputError: the mesh does not fit the devices, or an axis does not divide.
    """
    model, objective = experiment.model, experiment.objective
    mesh = sharding.make_mesh(experiment.mesh, devices)
    rules = sharding.without(experiment.rules, experiment.replicate)

    def init_params(key):
        zeros = (jnp.zeros((1, *x.shape[1:]), x.dtype) for x in inputs)
        return model.init(key, *zeros)["params"]

    try:
        boxed = jax.eval_shape(init_params, jax.random.key(0))
    except (ValueError, TypeError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        reason = str(error).splitlines()[0]
        raise InputError(f"the model does not take inputs of {shapes}: {reason}") from error
    explanation = sharding.explain(boxed, mesh, rules)
    params = sharding.shardings(boxed, mesh, rules)
    tx = experiment.optimizer.make(nn.get_partition_spec(boxed), experiment.steps)

    def init(key):
        params = nn.unbox(init_params(key))
        return steps.init_state(params, tx, ema=experiment.ema is not None)

    shapes = jax.eval_shape(init, jax.random.key(0))
    places = sharding.shardings_like(shapes, params, mesh)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        places,
    )
    if getattr(experiment.optimizer, "qk_clip", None) is None:
        loss_fn = functools.partial(objective.loss, model.apply)
    elif hasattr(objective, "stages"):
        raise InputError(
            "optimizer.qk_clip looks at what every forward pass leaves, and stages take one "
            "of several; give one objective, or an optimizer without qk_clip"
        )
    else:
        loss_fn = steps.with_stats(objective.loss, model.apply)
    stopped = getattr(experiment.optimizer, "stopped", None)  # Of optim.Parts.
    loss_fn = loss_fn if stopped is None else stopped(loss_fn)
    step = functools.partial(
        steps.train_step,
        loss_fn=loss_fn,
        tx=tx,
        accumulate=experiment.accumulate,
        ema=experiment.ema,
        skip_nonfinite=experiment.nonfinite == "skip",
        prepare=getattr(objective, "prepare", None),
    )
    measure = functools.partial(objective.measure, model.apply)
    whole = NamedSharding(mesh, PartitionSpec())
    batch = sharding.batch_sharding(mesh, rules)
    key = jax.eval_shape(jax.random.key, 0)
    step = jax.jit(
        step,
        in_shardings=(places, batch, whole),
        out_shardings=(places, whole),
        donate_argnums=0,
    )
    return Setup(
        inputs=tuple(inputs),
        mesh=mesh,
        rules=rules,
        batch=batch,
        explanation=explanation,
        state=state,
        # Not under the rules: its one example need not divide over the mesh.
        init=_under(mesh, (), jax.jit(init, out_shardings=places)),
        step=_under(mesh, rules, step),
        lower=_under(mesh.abstract_mesh, rules, lambda batch: step.lower(state, batch, key)),
        measure=_under(mesh, rules, jax.jit(measure, out_shardings=whole)),
    )


def check_batch(experiment: Experiment, made: Setup) -> None:
    """Raises InputError where the devices do not divide the batch."""
    parts = made.batch_ways * experiment.accumulate
    if experiment.batch_size % parts:
        near = max(1, round(experiment.batch_size / parts)) * parts
        raise InputError(
            f"batch_size={experiment.batch_size} does not divide over {made.batch_ways} "
            f"devices and accumulate={experiment.accumulate}; {near} does"
        )


def _under(mesh, rules, function):
    """Traces `function` where activations are placed by `rules` on `mesh`."""

    @functools.wraps(function)
    def call(*args):
        with sharding.use(mesh, rules):
            return function(*args)

    return call


def model_flops(experiment: Experiment, inputs: Sequence[Any]) -> int | None:
    """Operations of one training step by the family's own count, forward and backward.

    `inputs` are those of the model for a batch; None where the config counts nothing.
    """
    if experiment.flops is None:
        return None
    shapes = (x.shape[1:] for x in inputs)
    return 3 * experiment.batch_size * experiment.flops(plain(experiment.model), *shapes)
