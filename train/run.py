"""The loop: one for every family, because what differs is the loss."""

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np

import evaluate.run as evaluation
from jaxformer import checkpoint
from jaxformer.data.loader import fingerprint, to_mesh, train_batches
from jaxformer.errors import InputError
from jaxformer.experiment import Experiment, describe, differences
from jaxformer.setup import Setup, setup
from jaxformer.steps import TrainState
from train.log import Log


class Diverged(RuntimeError):
    """The loss is not finite any more; one sentence says where and what remains."""


def train(
    experiment: Experiment,
    workdir: str | pathlib.Path,
    *,
    profile: tuple[int, int] | None = None,
    devices=None,
) -> TrainState:
    """Runs an experiment to its end, from its last checkpoint in `workdir` if any.

    Args:
      experiment: what to run.
      workdir: where the run lives; a run of another experiment there is an error.
      profile: steps between which a trace is written to `workdir/profile`.
      devices: all that JAX sees, if not given.

    Raises:
      InputError: something given cannot be used.
      Diverged: the loss became NaN or infinite and `experiment.nonfinite` is "stop".
    """
    workdir = pathlib.Path(workdir)
    _writable(workdir)
    check = getattr(experiment.objective, "check", None)
    for pipeline in (experiment.data, *experiment.evals.values()):
        if check is not None:
            check(experiment.model, pipeline)
    data = train_batches(
        experiment.data,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.closing(data):  # Ends its workers, however the run ends.
        return _train(experiment, workdir, data, profile, devices)


def _train(experiment, workdir, data, profile, devices) -> TrainState:
    inputs = _inputs(experiment)
    made = setup(experiment, inputs, devices)
    described = describe(experiment) | {
        "stream": fingerprint(experiment.data, experiment.batch_size, experiment.seed)
    }
    key = jax.random.key(experiment.seed)
    folder = workdir / "checkpoints"
    state, start = _begin(made, folder, described, key, data)
    with contextlib.ExitStack() as stack:
        manager = checkpoint.open_manager(
            folder,
            last=experiment.keep.last,
            best=experiment.keep.best,
            metric=experiment.keep.metric,
        )
        stack.callback(manager.close)
        flops = _flops(experiment, inputs)
        log = stack.enter_context(Log(workdir, experiment, described, start=start, flops=flops))
        log.say(
            f"{'resuming at step ' + str(start) if start else 'training'}: "
            f"{_count(state.params):,} parameters, {made.mesh.size} "
            f"{made.mesh.devices.flat[0].device_kind} device(s), {experiment.steps} steps"
        )
        return _loop(
            experiment, made, state, data, key, manager, log, described, start, profile
        )


def _loop(experiment, made, state, data, key, manager, log, described, start, profile):
    """Step n is sent off before the metrics of step n - 1 are looked at."""
    rate = experiment.optimizer.rate.make(experiment.steps)
    trace = _Trace(log.workdir / "profile", profile)
    pending = None
    for done in range(start + 1, experiment.steps + 1):
        trace.at(done)
        batch = to_mesh(next(data), made.batch)
        state, metrics = made.step(state, batch, key)
        if pending is not None:
            _look(experiment, log, *pending)
        pending = (done, metrics | {"learning_rate": rate(done - 1)})
        last = done == experiment.steps
        ends_eval = bool(experiment.evals) and (last or done % experiment.eval_every == 0)
        ends_save = last or done % experiment.keep.every == 0
        if ends_eval or ends_save:
            _look(experiment, log, *pending)  # Nothing that is not finite is saved.
            pending = None
        scores = _evaluate(experiment, made, state) if ends_eval else {}
        if scores:
            log.evaluation(done, scores)
        if ends_save:
            tree = {"state": state, "key": jax.random.key_data(key)}
            checkpoint.save(manager, done, tree, data, described, scores)
        if ends_eval or ends_save:
            log.resume_clock()
    trace.stop()
    manager.wait_until_finished()
    return state


def _look(experiment, log, step, metrics):
    """Reads the metrics of a step, which waits for it, and stops where it diverged."""
    metrics = {name: float(value) for name, value in metrics.items()}
    if experiment.nonfinite == "stop" and not np.isfinite(metrics["loss"]):
        saved = checkpoint.steps(log.workdir / "checkpoints")
        rest = f"the checkpoint of step {saved[-1]} is whole" if saved else "none was saved"
        raise Diverged(
            f"step {step}: the loss is {metrics['loss']}; {rest}: lower optimizer.rate.peak, "
            "or set nonfinite=skip to leave such steps out"
        )
    log.step(step, metrics)


def _evaluate(experiment: Experiment, made: Setup, state: TrainState) -> dict[str, float]:
    params = state.params if state.ema is None else state.ema
    scores = {}
    for name, pipeline in experiment.evals.items():
        batches = evaluation.batches(pipeline, experiment.eval_batch_size, made.batch_ways)
        found = evaluation.evaluate(made.measure, params, batches, made.batch)
        scores |= {f"{name}/{k}": v for k, v in evaluation.scalars(found).items()}
    return scores


def _begin(made, folder, described, key, data) -> tuple[TrainState, int]:
    """The state of the last checkpoint, or a new one."""
    saved = checkpoint.steps(folder)
    if not saved:
        return made.init(key), 0
    step = saved[-1]
    lines = differences(checkpoint.read_experiment(folder, step), described)
    if lines:
        raise InputError(
            f"{folder}: step {step} is of another experiment; choose another --workdir, or "
            "take the changes back (- in the checkpoint, + now):\n" + "\n".join(lines)
        )
    data_key = jax.random.key_data(key)
    target = {
        "state": made.state,
        "key": jax.ShapeDtypeStruct(
            data_key.shape, data_key.dtype, sharding=made.state.step.sharding
        ),
    }
    return checkpoint.restore(folder, step, target, data)["state"], step


def _writable(workdir: pathlib.Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{workdir}: the run cannot be written there ({error.strerror}); choose another "
            "directory with --workdir"
        ) from error


def _inputs(experiment: Experiment) -> list[Any]:
    """What the model is called with: a first batch, made here and not by workers, tells."""
    pipeline = dataclasses.replace(experiment.data, workers=0)
    size = experiment.batch_size
    with contextlib.closing(train_batches(pipeline, batch_size=size, seed=0)) as data:
        batch = next(data)
    return [jax.typeof(batch[name]) for name in experiment.objective.inputs]


def _flops(experiment: Experiment, inputs) -> int | None:
    """Operations of one training step: forward and twice as much backward."""
    if experiment.flops is None:
        return None
    shapes = (x.shape[1:] for x in inputs)
    return 3 * experiment.batch_size * experiment.flops(experiment.model, *shapes)


def _count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


class _Trace:
    """Writes a profile of the steps from `first` to before `last`."""

    def __init__(self, directory: pathlib.Path, steps: tuple[int, int] | None):
        self.directory = directory
        self.first, self.last = steps or (0, 0)
        self.running = False

    def at(self, step: int) -> None:
        if step == self.first:
            jax.profiler.start_trace(str(self.directory))
            self.running = True
        elif step >= self.last:
            self.stop()

    def stop(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
