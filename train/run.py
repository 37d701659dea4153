"""The loop: one for every family, because what differs is the loss."""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import evaluate.run as evaluation
from jaxformer import checkpoint, hosts
from jaxformer.data.loader import fingerprint, to_mesh, train_batches
from jaxformer.errors import InputError
from jaxformer.experiment import Experiment, arguments, describe
from jaxformer.setup import Setup, check_batch, model_flops, setup
from jaxformer.steps import TrainState
from train.begin import begin, newest
from train.log import Log, Unsaved
from train.pace import Pace
from train.spoiled import WAYS, Spikes, Spoiled
from train.watch import Preempted, Watchdog

PATIENCE = 3600.0  # seconds; a first compile must fit into it.
SKIPS = 100  # steps in a row that nonfinite=skip leaves out before it gives up.
BACKS = 3  # times that nonfinite=back goes back to one checkpoint before it gives up.


class Diverged(RuntimeError):
    """A number is not finite any more; one sentence says where and what remains."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the loop works with."""

    experiment: Experiment
    made: Setup
    described: dict[str, Any]
    key: jax.Array
    data: grain.DatasetIterator
    manager: ocp.CheckpointManager
    log: Log
    preempted: Preempted
    watchdog: Watchdog
    pace: Pace
    spikes: Spikes
    backs: collections.Counter[int]  # by the step of the checkpoint.
    rate: Callable[..., Any]  # of learning, by the steps that the optimizer has taken.


def train(
    experiment: Experiment,
    workdir: str | pathlib.Path,
    *,
    profile: tuple[int, int] | None = None,
    patience: float = PATIENCE,
    devices=None,
) -> TrainState:
    """Runs an experiment to its end, from its last checkpoint in `workdir` if any.

    Args:
      experiment: what to run.
      workdir: where the run lives; a run of another experiment there is an error.
      profile: steps between which a trace is written to `workdir/profile`.
      patience: seconds without a step, a batch of an evaluation or a save after which the
        process is ended as stuck; 0 waits for ever. Tasks may take as long as they take.
      devices: all that JAX sees, if not given.

    Raises:
      InputError: something given cannot be used.
      Diverged: a loss, gradient or parameter became NaN or infinite.
      Unsaved: the disk is full, or gone.
    """
    if "://" in str(workdir):
        raise InputError(
            f"{workdir}: a run lives on a file system; mount the store and name that"
        )
    if not patience >= 0:
        raise InputError(f"--patience {patience:g}: must be 0, which waits for ever, or more")
    workdir = pathlib.Path(workdir)
    made = prepare(experiment, devices)
    _writable(workdir)
    folder = workdir / "checkpoints"
    described = describe(experiment)
    stream = fingerprint(experiment.data, experiment.batch_size, experiment.seed)
    config = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]
    hosts.agree(config=config, data=stream, code=hosts.code())
    described |= {"stream": stream}
    with contextlib.ExitStack() as stack:
        data = train_batches(
            experiment.data,
            batch_size=experiment.batch_size,
            seed=experiment.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        stack.enter_context(contextlib.closing(data))  # Ends its workers.
        state, key, start = begin(experiment, made, folder, described, data)
        manager = checkpoint.open_manager(
            folder,
            last=experiment.keep.last,
            best=experiment.keep.best,
            metric=experiment.keep.metric,
        )
        stack.push(_closing(manager, folder))
        log = stack.enter_context(
            Log(
                workdir,
                experiment,
                described,
                start=start,
                flops=model_flops(experiment, made.inputs),
            )
        )
        log.say(
            f"{f'resuming at step {start}' if start else 'training'}: "
            f"{_count(state.params):,} parameters, {made.mesh.size} "
            f"{made.mesh.devices.flat[0].device_kind} device(s), {experiment.steps} steps"
        )
        if said := getattr(experiment.objective, "left_out", lambda _: "")(experiment.steps):
            log.say(said)
        trace = stack.enter_context(_Trace(workdir / "profile", profile))
        preempted = stack.enter_context(Preempted())
        watchdog = stack.enter_context(Watchdog(patience))
        pace = stack.enter_context(Pace(workdir))
        run = _Run(
            experiment, made, described, key, data, manager, log, preempted, watchdog,
            pace, Spikes(experiment.spike), collections.Counter(),
            experiment.optimizer.rate.make(experiment.steps),
        )  # fmt: skip
        while True:
            try:
                return _loop(run, state, start, trace)
            except Spoiled as error:
                spoiled = error.with_traceback(None)  # Which would hold the state.
            del state
            state, start = _back(run, spoiled)


def prepare(experiment: Experiment, devices=None) -> Setup:
    """Finds whatever is wrong with an experiment before anything is compiled or written."""
    evaluation.check(experiment)
    made = setup(experiment, _inputs(experiment), devices)
    check_batch(experiment, made)
    evaluation.check_inputs(experiment, made)
    hosts.check_rows(made.batch, experiment.batch_size)
    return made


def _loop(run: _Run, state: TrainState, start: int, trace: "_Trace") -> TrainState:
    """Step n is sent off before the metrics of step n - 1 are looked at."""
    experiment, made = run.experiment, run.made
    pending = None
    for done in range(start + 1, experiment.steps + 1):
        trace.at(done)
        with run.log.clock.doing("input"):
            batch = to_mesh(next(run.data), made.batch)
        first = done == start + 1
        with run.log.clock.doing("compile") if first else run.pace.waiting():
            state, metrics = made.step(state, batch, run.key)
        if pending is not None:
            _look(run, state, *pending)
        pending = (done, metrics)
        last = done == experiment.steps
        with run.pace.waiting():
            leaves = run.preempted.at(done) and not last
        evaluates = bool(experiment.evals) and (last or done % experiment.eval_every == 0)
        saves = last or leaves or done % experiment.keep.every == 0
        if evaluates or saves:
            _look(run, state, *pending)
            pending = None
            if not _all_finite(state):  # Nothing that is not finite is saved.
                raise _spoiled(run, state, done, _infinite(state))
            scores = {}
            try:
                with run.log.clock.doing("evaluation"):
                    scores = _evaluate(run, state) if evaluates else {}
            finally:  # What was trained is saved, also where an evaluation fails.
                if saves:
                    tree = {"state": state, "key": _key_data(made, run.key)}
                    with run.log.clock.doing("save"):
                        _save(run, done, tree, scores)
            if scores:
                run.log.evaluation(done, scores)
                _pictures(run, state, done)
            run.log.resume_clock()
            run.pace.resume()
            run.watchdog.alive(done)
        if leaves:
            _save(run)
            run.log.say(f"asked to end: step {done} is saved; the same command goes on from it")
            return state
    _save(run)
    _judge(run, state)
    return state


def _save(run: _Run, step: int | None = None, tree: Any = None, scores: Any = None) -> None:
    """Begins to write a checkpoint, or without one waits until all are written."""
    with _saving(run.log.workdir / "checkpoints"):
        if step is None:
            run.manager.wait_until_finished()
        else:
            checkpoint.save(run.manager, step, tree, run.data, run.described, scores)


@contextlib.contextmanager
def _saving(folder: pathlib.Path) -> Iterator[None]:
    """Tells what a disk says in one sentence; it may be of the checkpoint before."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: of TensorStore.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise Unsaved(
            f"{folder}: a checkpoint could not be written ({reason}); {_remaining(folder)}: "
            "make room there, and start the same command again"
        ) from error


def _closing(manager: ocp.CheckpointManager, folder: pathlib.Path):
    """What waits at the end for all that is being written, after whatever happened."""

    def close(kind, error, trace) -> None:
        if error is None:
            with _saving(folder):
                manager.close()
        else:
            # One fault is enough to tell.
            with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
                manager.close()

    return close


def _remaining(folder: pathlib.Path) -> str:
    saved = checkpoint.steps(folder)
    return f"the checkpoint of step {saved[-1]} is whole" if saved else "none was saved"


def _judge(run: _Run, state: TrainState) -> None:
    """Runs the tasks of the last step, but for those that a run before has finished."""
    steps, tasks = run.experiment.steps, run.experiment.tasks
    left = {name: task for name, task in tasks.items() if not run.log.told(steps, name)}
    if not left:
        return
    params = state.params if state.ema is None else state.ema
    with run.watchdog.off():
        experiment = dataclasses.replace(run.experiment, tasks=left)
        found = evaluation.run_tasks(experiment, run.made, params)
    scores = {name: evaluation.scalars(metrics) for name, metrics in found.items()}
    run.log.evaluation(
        steps,
        {f"{task}/{name}": v for task, part in scores.items() for name, v in part.items()},
    )


def _pictures(run: _Run, state: TrainState, step: int) -> None:
    """Draws what a person is to see of the model, into the run's folder `pictures`."""
    params = state.params if state.ema is None else state.ema
    trained = evaluation.trained(run.experiment, run.made, params)
    for name, picture in run.experiment.pictures.items():
        picture.picture(trained, run.log.workdir / "pictures" / f"{name}_{step:06}.png")


def _look(run: _Run, state: TrainState, step: int, metrics: dict[str, jax.Array]) -> None:
    """Reads the metrics of a step, which waits for it, and raises where it diverged.

    `state` is the newest there is, of this step or the next.
    """
    with run.pace.waiting():
        found = jax.device_get(metrics)
    values = {name: float(value) for name, value in found.items()}
    taken = step - 1 - run.log.left_out  # steps before this one, as the optimizer counts.
    values["learning_rate"] = float(run.rate(taken))
    run.watchdog.alive(step)
    if (slow := run.pace.step(step)) is not None:
        run.log.say(slow, all_processes=True)
    run.log.step(step, values)
    broken = [n for n in ("loss", "grad_norm") if not np.isfinite(values[n])]
    if broken:
        what = f"{broken[0]} is {values[broken[0]]}"
    else:
        what = run.spikes.seen(values["loss"], values.get("stage"))
    if what and run.experiment.nonfinite != "skip":
        raise _spoiled(run, state, step, what)
    if run.log.skips_in_a_row >= SKIPS:
        raise Diverged(_diverged(run, step, f"{SKIPS} steps in a row were left out"))


def _spoiled(run: _Run, state: TrainState, step: int, what: str) -> Exception:
    """What is raised after a step that is not to be kept."""
    if run.experiment.nonfinite != "back":
        return Diverged(_diverged(run, step, what))
    jax.block_until_ready(state)  # One program at a time: see `checkpoint.digest`.
    return Spoiled(step, what)


def _diverged(run: _Run, step: int, what: str) -> str:
    _save(run)
    return (
        f"step {step}: {what}; {_remaining(run.log.workdir / 'checkpoints')}: lower "
        f"optimizer.rate.peak{WAYS[run.experiment.nonfinite]}"
    )


def _back(run: _Run, spoiled: Spoiled) -> tuple[TrainState, int]:
    """The state of the last checkpoint and its step; the data goes on from where it stands.

    A checkpoint that was gone back to `BACKS` times may be spoiled itself, though all in it
    is finite: it is set aside then, and the one before is taken.

    Raises:
      Diverged: there is no checkpoint that was not gone back to so often.
    """
    _save(run)
    folder = run.log.workdir / "checkpoints"
    saved = checkpoint.steps(folder)
    left = [step for step in saved if run.backs[step] < BACKS]
    if not left:
        raise Diverged(_diverged(run, spoiled.step, spoiled.what))
    for step in saved[saved.index(left[-1]) + 1 :]:
        run.log.say(
            f"warning: going back to step {step} was in vain {BACKS} times; it is set aside"
        )
        if jax.process_index() == 0:
            checkpoint.set_aside(folder, step)
    hosts.meet("set aside")
    now = run.data.get_state()
    state, _, step = newest(
        run.experiment, run.made, folder, left, run.described, run.data, run.key, run.log.say
    )
    run.manager.reload()  # Those set aside are gone.
    run.backs[step] += 1
    left_out = now["step"] - run.data.get_state()["step"]
    run.data.set_state(now)
    if jax.process_index() == 0:
        with _saving(folder):
            checkpoint.go_on(folder, step, run.data)
    run.log.back(step, spoiled.step, left_out, spoiled.what)
    return state, step


def _evaluate(run: _Run, state: TrainState) -> dict[str, float]:
    params = state.params if state.ema is None else state.ema
    experiment, made = run.experiment, run.made
    scores = {}
    for name, pipeline in experiment.evals.items():
        batches = evaluation.batches(pipeline, experiment.eval_batch_size, made.batch_ways)
        batches = run.watchdog.fed(batches)
        found = evaluation.evaluate(made.measure, params, batches, made.batch)
        scores |= {f"{name}/{k}": v for k, v in evaluation.scalars(found).items()}
    return scores


def _key_data(made: Setup, key: jax.Array) -> jax.Array:
    """The run's key as an array that lies on the whole mesh, as the state does."""
    return jax.device_put(jax.random.key_data(key), made.state.step.sharding)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _infinite(state: TrainState) -> str:
    parts = {"a parameter": state.params, "the optimizer's state": state.opt_state}
    broken = [name for name, part in parts.items() if not _all_finite(part)]
    return f"{(*broken, 'the average')[0]} is not finite"


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
    return arguments(experiment.objective, batch)


def _count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


class _Trace:
    """Writes a profile of the steps from `first` to before `last`."""

    def __init__(self, directory: pathlib.Path, steps: tuple[int, int] | None):
        self.directory = directory
        self.first, self.last = steps or (0, 0)
        self.running = False

    def __enter__(self) -> "_Trace":
        return self

    def __exit__(self, *error) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False

    def at(self, step: int) -> None:
        """Starts or ends the trace before `step` is sent off."""
        if self.running and step >= self.last:
            self.__exit__()
        elif not self.running and self.first <= step < self.last:
            jax.profiler.start_trace(str(self.directory))
            self.running = True
