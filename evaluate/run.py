"""Evaluation that is exact on any mesh: sums over every example, padding weighs 0."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import numpy as np
from jax.dtypes import canonicalize_dtype
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformer import checkpoint, metrics, sharding
from jaxformer.data.loader import Pipeline, eval_batches, to_mesh
from jaxformer.errors import InputError
from jaxformer.experiment import Experiment, arguments, describe, differences
from jaxformer.lora import plain
from jaxformer.setup import Setup, setup


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
    return eval_batches(
        pipeline,
        batch_size=rows(batch_size, ways),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def rows(batch_size: int, ways: int) -> int:
    """Of a batch of all processes: `batch_size`, or the next that splits `ways` ways."""
    unit = math.lcm(ways, jax.process_count())
    return math.ceil(batch_size / unit) * unit


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with its parameters on a mesh, as a task is given it.

    `apply` is the module's. The functions that `collect` and `measure` take are pure and
    are called `(apply, params, batch)`, compiled, with batches split over the mesh.
    """

    apply: Callable[..., Any]
    params: Any
    mesh: Mesh
    rules: sharding.Rules
    batch_size: int = 256
    model: nn.Module | None = None  # whose `apply` it is, where a task needs more of it.
    objective: Any = None  # by which it learned: how it is drawn from, where it can be.
    averaged: float | None = None  # the decay, where these are averaged parameters.

    def collect(self, function: Callable[..., Any], pipeline: Pipeline) -> Any:
        """What `function` makes of every record, in order: arrays `[N, ...]` on the host.

        `function` gives a tree of arrays with the batch first; padding is left out.
        """

        def rows(params, batch):
            return function(self.apply, params, batch), batch["weight"]

        rows = jax.jit(rows, out_shardings=self._whole)
        parts = []
        for batch in batches(pipeline, self.batch_size, self._ways):
            with sharding.use(self.mesh, self.rules):
                made, weight = rows(self.params, to_mesh(batch, self._split))
            real = np.asarray(weight) > 0
            parts.append(jax.tree.map(lambda x, real=real: np.asarray(x)[real], made))
        return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

    def measure(
        self, function: Callable[..., metrics.Metrics], pipeline: Pipeline, *whole: Any
    ) -> metrics.Metrics:
        """Adds up `function(apply, params, batch, *whole)` over all batches.

        `whole` are trees of arrays that every device holds.
        """

        def measure(params, batch, whole):
            return function(self.apply, params, batch, *whole)

        measure = jax.jit(measure, out_shardings=self._whole)
        whole = jax.device_put(jax.device_get(whole), self._whole)

        def add(params, batch, key):
            with sharding.use(self.mesh, self.rules):
                return measure(params, batch, whole)

        data = batches(pipeline, self.batch_size, self._ways)
        return evaluate(add, self.params, data, self._split)

    def score(self, objective: Any, pipeline: Pipeline) -> metrics.Metrics:
        """Adds up an objective's `measure` over all batches, each with a key of its own."""
        measure = jax.jit(
            functools.partial(objective.measure, self.apply), out_shardings=self._whole
        )

        def add(params, batch, key):
            with sharding.use(self.mesh, self.rules):
                return measure(params, batch, key)

        data = batches(pipeline, self.batch_size, self._ways)
        return evaluate(add, self.params, data, self._split)

    @property
    def _split(self) -> NamedSharding:
        return sharding.batch_sharding(self.mesh, self.rules)

    @property
    def _whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def _ways(self) -> int:
        return sharding.ways(self.mesh, self._split.spec[0])


def run_tasks(experiment: Experiment, made: Setup, params: Any) -> dict[str, metrics.Metrics]:
    """What every task of an experiment finds about these parameters."""
    found = trained(experiment, made, params)
    return {name: task.run(found) for name, task in experiment.tasks.items()}


def trained(experiment: Experiment, made: Setup, params: Any) -> Trained:
    """An experiment's model with these parameters, where they are."""
    model, size = experiment.model, experiment.eval_batch_size
    return Trained(
        model.apply,
        params,
        made.mesh,
        made.rules,
        size,
        model,
        experiment.objective,
        experiment.ema,
    )


def evaluate_checkpoint(
    experiment: Experiment,
    directory: str | pathlib.Path,
    step: int | None = None,
    *,
    devices=None,
) -> tuple[int, dict[str, metrics.Metrics]]:
    """Every evaluation and task of an experiment on a checkpoint of its run.

    Args and errors are those of `restored`.
    """
    if not experiment.evals and not experiment.tasks:
        raise InputError("the experiment has no evals and no tasks; name some in its config")
    step, made, params = restored(experiment, directory, step, devices=devices)
    return step, measured(experiment, made, params)


def measured(experiment: Experiment, made: Setup, params: Any) -> dict[str, metrics.Metrics]:
    """Every evaluation and task of an experiment on these parameters."""
    found = {}
    for name, pipeline in experiment.evals.items():
        data = batches(pipeline, experiment.eval_batch_size, made.batch_ways)
        found[name] = evaluate(made.measure, params, data, made.batch)
    return found | run_tasks(experiment, made, params)


def restored(
    experiment: Experiment,
    directory: str | pathlib.Path,
    step: int | None = None,
    *,
    devices=None,
) -> tuple[int, Setup, Any]:
    """The step, the layout and the parameters of a checkpoint of an experiment's run.

    Reads the averaged parameters where the run kept them, and nothing of the optimizer.

    Args:
      experiment: the one that was trained.
      directory: the run's directory, or its folder of checkpoints.
      step: which checkpoint, the last if not given.
      devices: all that JAX sees, if not given.

    Raises:
      InputError: no such checkpoint, a damaged one, or one of another model.
    """
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
    made = setup(experiment, _inputs(experiment), devices)
    part = "params" if experiment.ema is None else "ema"
    target = {"state": {part: getattr(made.state, part)}}
    return step, made, checkpoint.restore(folder, step, target, part=True)["state"][part]


def _inputs(experiment: Experiment) -> list[Any]:
    """What the model is called with: the first batch that has it all tells."""
    names = experiment.objective.inputs
    for pipeline in _pipelines(experiment):
        first = next(iter(batches(pipeline, 1, 1)))
        if all(name in first for name in names):
            return arguments(experiment.objective, first)
    raise InputError(
        f"no eval and no task has records with {', '.join(names)}, which the model is called "
        "with; name one that has"
    )


def _pipelines(experiment: Experiment) -> Iterator[Pipeline]:
    """All that an evaluation reads."""
    yield from experiment.evals.values()
    for task in experiment.tasks.values():
        yield from (value for value in vars(task).values() if isinstance(value, Pipeline))


def check(experiment: Experiment) -> None:
    """Raises InputError where data does not fit the objective or cannot be read at all."""
    check = getattr(experiment.objective, "check", lambda model, pipeline: None)
    for pipeline in (experiment.data, *experiment.evals.values()):
        check(plain(experiment.model), pipeline)
    for pipeline in (experiment.data, *_pipelines(experiment)):
        getattr(pipeline.source, "check", lambda: None)()
    for task in (*experiment.tasks.values(), *experiment.pictures.values()):
        getattr(task, "check", lambda: None)()
    for pipeline in _pipelines(experiment):
        next(iter(batches(pipeline, 1, 1)))


def check_inputs(experiment: Experiment, made: Setup) -> None:
    """Raises InputError where the model does not take what an eval has; computes nothing.

    So too where the metric that checkpoints are kept by is none of them.
    """
    size, known = rows(experiment.eval_batch_size, made.batch_ways), []
    measure = functools.partial(experiment.objective.measure, experiment.model.apply)
    for name, pipeline in experiment.evals.items():
        batch = {
            key: jax.ShapeDtypeStruct((size, *x.shape[1:]), canonicalize_dtype(x.dtype))
            for key, x in next(iter(batches(pipeline, 1, 1))).items()
        }
        try:
            with sharding.use(made.mesh, made.rules):
                found = jax.eval_shape(measure, made.state.params, batch, jax.random.key(0))
        except (ValueError, TypeError, flax.errors.FlaxError) as error:
            own = (batch[key] for key in experiment.objective.inputs)
            given, learned = (
                ", ".join(str(tuple(x.shape)) for x in some) for some in (own, made.inputs)
            )
            raise InputError(
                f"evals.{name}: the model, which learns from inputs of {learned}, does not "
                f"take {given}: {str(error).splitlines()[0]}"
            ) from error
        nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), found)
        known += [f"{name}/{key}" for key in scalars(nothing)]
    metric = experiment.keep.metric.removeprefix("-")
    if experiment.evals and experiment.keep.best and metric not in known:
        raise InputError(
            f"keep.metric={metric} is not measured; choose one of {', '.join(known)}, or set "
            "keep.best=0"
        )


def scalars(found: metrics.Metrics) -> dict[str, float]:
    """The metrics that are single numbers."""
    values = {name: metric.value() for name, metric in found.items()}
    return {name: value for name, value in values.items() if isinstance(value, float)}
