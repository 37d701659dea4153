"""Evaluation that is exact on any mesh: sums over every example, padding weighs 0."""

import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxformer import checkpoint, metrics
from jaxformer.data.loader import Pipeline, eval_batches, to_mesh
from jaxformer.errors import InputError
from jaxformer.experiment import Experiment, describe, differences
from jaxformer.setup import setup


def evaluate(
    measure: Callable[[Any, dict, jax.Array], metrics.Metrics],
    params: Any,
    batches: Iterable[dict],
    batch_sharding: jax.sharding.Sharding,
) -> metrics.Metrics:
    """Adds up `measure(params, batch, key)` over all batches; the sums are 64-bit.

    The key is that of the batch's number, the same at every evaluation.
    """
    total, run_key = None, jax.random.key(0)
    for number, batch in enumerate(batches):
        key = jax.random.fold_in(run_key, number)
        part = metrics.to_host(measure(params, to_mesh(batch, batch_sharding), key))
        total = part if total is None else metrics.merge(total, part)
    if total is None:
        raise ValueError("evaluation needs at least one batch")
    return total


def batches(pipeline: Pipeline, batch_size: int, ways: int) -> Iterable[dict]:
    """This process's batches of every record once, of a size that splits `ways` ways."""
    size = math.ceil(batch_size / math.lcm(ways, jax.process_count()))
    return eval_batches(
        pipeline,
        batch_size=size * math.lcm(ways, jax.process_count()),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def evaluate_checkpoint(
    experiment: Experiment,
    directory: str | pathlib.Path,
    step: int | None = None,
    *,
    devices=None,
) -> tuple[int, dict[str, metrics.Metrics]]:
    """Every evaluation of an experiment on a checkpoint of its run.

    Reads the averaged parameters where the run kept them, and nothing of the optimizer.

    Args:
      experiment: the one that was trained.
      directory: the run's directory, or its folder of checkpoints.
      step: which checkpoint, the last if not given.
      devices: all that JAX sees, if not given.

    Raises:
      InputError: no such checkpoint, a damaged one, or one of another model.
    """
    if not experiment.evals:
        raise InputError("the experiment has no evals; name some in its config")
    folder = checkpoint.find(directory)
    saved = checkpoint.steps(folder)
    step = saved[-1] if step is None else step
    if step not in saved:
        raise InputError(f"{folder}: has no step {step}; it has {', '.join(map(str, saved))}")
    check(experiment)
    described = checkpoint.read_experiment(folder, step)
    lines = differences(described["model"], describe(experiment.model), ("remat", "unroll"))
    if lines:
        raise InputError(
            f"{folder}: step {step} is of another model; give the config and overrides it was "
            "trained with (- in the checkpoint, + now):\n" + "\n".join(lines)
        )
    first = next(iter(batches(next(iter(experiment.evals.values())), 1, 1)))
    inputs = [jax.typeof(first[name]) for name in experiment.objective.inputs]
    made = setup(experiment, inputs, devices)
    part = "params" if experiment.ema is None else "ema"
    target = {"state": {part: getattr(made.state, part)}}
    params = checkpoint.restore(folder, step, target, part=True)["state"][part]
    found = {}
    for name, pipeline in experiment.evals.items():
        data = batches(pipeline, experiment.eval_batch_size, made.batch_ways)
        found[name] = evaluate(made.measure, params, data, made.batch)
    return step, found


def check(experiment: Experiment) -> None:
    """Raises InputError where data does not fit the objective or cannot be read at all."""
    check = getattr(experiment.objective, "check", lambda model, pipeline: None)
    check(experiment.model, experiment.data)
    for pipeline in experiment.evals.values():
        check(experiment.model, pipeline)
        next(iter(batches(pipeline, 1, 1)))


def scalars(found: metrics.Metrics) -> dict[str, float]:
    """The metrics that are single numbers."""
    values = {name: metric.value() for name, metric in found.items()}
    return {name: value for name, value in values.items() if isinstance(value, float)}
