"""An experiment as data: what a config file returns, overrides reach and a run records."""

import ast
import collections.abc
import dataclasses
import difflib
import functools
import importlib.util
import pathlib
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxformer.data.loader import Pipeline
from jaxformer.errors import InputError
from jaxformer.sharding import FSDP_TENSOR, Rules


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the last `last`, and the best `best` by `metric`."""

    every: int = 100  # steps between two saves; the last step is saved always.
    last: int = 2
    best: int = 1
    metric: str = "test/top1"  # EVALUATION/METRIC; -EVALUATION/METRIC: less is better.

    def __post_init__(self):
        _at_least(1, **{"keep.every": self.every, "keep.last": self.last})
        _at_least(0, **{"keep.best": self.best})


@runtime_checkable
class Objective(Protocol):
    """What an experiment learns by: a frozen dataclass of numbers, with pure methods.

    It may have `check(model, pipeline)`, which raises InputError where they do not fit, and
    `arguments(*inputs)`, what the model is called with where that is more than the inputs.
    """

    @property
    def inputs(self) -> tuple[str, ...]:
        """The entries of a batch that the model is called with, in order."""
        ...

    def loss(self, apply: Callable, params: Any, batch: dict, key: Array) -> tuple:
        """A float32 scalar, and a dict of scalars beside it."""
        ...

    def measure(self, apply: Callable, params: Any, batch: dict, key: Array) -> dict:
        """Metrics of one evaluation batch that add up, see `jaxformer.metrics`."""
        ...


def arguments(objective: Objective, batch: dict) -> list[jax.ShapeDtypeStruct]:
    """What the model is called with on such a batch, by shape and dtype."""
    make = getattr(objective, "arguments", lambda *inputs: inputs)
    return list(jax.eval_shape(make, *(batch[name] for name in objective.inputs)))


@runtime_checkable
class Task(Protocol):
    """What a trained model is judged by beside its evals: a frozen dataclass.

    Such as `evaluate.knn.KNN`. It may have `check()`, which raises InputError.
    """

    def run(self, trained: Any) -> dict:
        """Metrics that add up, of a model as `evaluate.run.Trained`."""
        ...


@runtime_checkable
class Picture(Protocol):
    """What a person sees of a model while it learns: a frozen dataclass.

    Such as `evaluate.grid.Grid`.
    """

    def picture(self, trained: Any, path: pathlib.Path) -> pathlib.Path:
        """Draws a PNG of a model as `evaluate.run.Trained`."""
        ...


@runtime_checkable
class Start(Protocol):
    """What a run begins with: a frozen dataclass, such as `start.Run`."""

    def read(self, params: Any, mesh: Any, rules: Any) -> Any:
        """Parameters in the place of those that were drawn."""
        ...


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run, whole: the same experiment and seed give the same parameters."""

    model: nn.Module
    objective: Objective
    optimizer: Any  # .make(axes, steps) -> optax transformation, .rate
    data: Pipeline
    steps: int
    batch_size: int
    evals: dict[str, Pipeline] = dataclasses.field(default_factory=dict)
    tasks: dict[str, Task] = dataclasses.field(default_factory=dict)  # after the last step.
    pictures: dict[str, Picture] = dataclasses.field(default_factory=dict)  # at every eval.
    eval_every: int = 100
    eval_batch_size: int = 256
    keep: Keep = dataclasses.field(default_factory=Keep)
    log_every: int = 10
    seed: int = 0
    accumulate: int = 1  # parts that a batch is taken in, one after the other.
    ema: float | None = None  # decay of the averaged parameters; they are evaluated.
    start: tuple[Start, ...] = ()  # parameters of files, in the place of drawn ones.
    # On a loss that is NaN or infinite; back: to the last checkpoint, with other batches.
    nonfinite: Literal["stop", "skip", "back"] = "stop"
    spike: float | None = None  # a loss so many times the median of those before is as bad.
    mesh: str = ""  # such as data=2,fsdp=4; empty is all devices on data.
    rules: Rules = FSDP_TENSOR
    replicate: tuple[str, ...] = ()  # logical axes that stay whole on every device.
    flops: Callable[..., int] | None = None  # (model, shape of one input) -> forward.

    def __post_init__(self):
        _at_least(
            1,
            steps=self.steps,
            batch_size=self.batch_size,
            eval_every=self.eval_every,
            eval_batch_size=self.eval_batch_size,
            log_every=self.log_every,
            accumulate=self.accumulate,
        )
        _at_least(0, seed=self.seed)
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InputError(f"ema={self.ema} must lie in [0, 1); 0.999 is usual")
        if self.spike is not None and (self.spike <= 1 or self.nonfinite == "skip"):
            raise InputError(
                f"spike={self.spike:g}, nonfinite={self.nonfinite}: it must be above 1, and is "
                "seen too late to skip; 3 is usual, with nonfinite=back"
            )
        for name in self.tasks:
            if name in self.evals:
                raise InputError(f"tasks.{name} has the name of an eval; choose another")


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise InputError(f"{name}={value} must be {least} or more")


# What may differ between a run and its checkpoint: how it runs, not what it computes.
FREE = (
    "steps",
    "mesh",
    "rules",
    "replicate",
    "log_every",
    "eval_every",
    "eval_batch_size",
    "keep",
    "evals",
    "tasks",
    "pictures",
    "nonfinite",
    "spike",
    "data.workers",
    "model.remat",
    "model.unroll",
)


def workdir(config: str | pathlib.Path) -> pathlib.Path:
    """Where a run of the config at this path is kept, unless it is told otherwise."""
    return pathlib.Path("runs") / pathlib.Path(config).stem


def load(path: str | pathlib.Path, assignments: collections.abc.Sequence[str] = ()):
    """Runs the config file at `path`, which defines `experiment()`, and overrides it.

    Args:
      path: a Python file. It is code: run only your own.
      assignments: such as `model.depth=8`.

    Raises:
      InputError: no such file, no `experiment`, or an override that does not fit.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.py")) or ["none"]
        raise InputError(f"{path}: there is no such config; beside it are {', '.join(beside)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: a config is a Python file; name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, "experiment", None)
    if not callable(make):
        raise InputError(
            f"{path}: a config defines a function experiment() that returns an Experiment"
        )
    made = make()
    if not isinstance(made, Experiment):
        raise InputError(
            f"{path}: experiment() returned {type(made).__name__}; it returns an Experiment"
        )
    return override(made, *assignments)


def override(node: Any, *assignments: str) -> Any:
    """Returns `node` with each `a.b=value` replaced, in dataclasses, dicts and tuples.

    Raises:
      InputError: a name that is not there, with the nearest that is, or a wrong type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"{assignment!r} must be NAME=VALUE, such as steps=500")
        node = _replace(node, path.split("."), text, path)
    return node


def fields(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that an override reaches, as (`a.b`, value), outermost first."""
    for name, value in _children(node).items():
        path = f"{prefix}{name}"
        if _children(value):
            yield from fields(value, f"{path}.")
        else:
            yield path, value


def describe(node: Any) -> Any:
    """The experiment as JSON: dataclasses as dicts that carry their `type`."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        items = {name: describe(value) for name, value in _children(node).items()}
        return {"type": type(node).__name__} | items
    if isinstance(node, dict):
        return {str(name): describe(value) for name, value in node.items()}
    if isinstance(node, tuple | list):
        return [describe(value) for value in node]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if isinstance(node, functools.partial):
        return [describe(node.func), describe(node.args), describe(node.keywords)]
    try:
        return str(jnp.dtype(node))
    except TypeError:  # A function, or an object of the user's: its name, no address.
        named = node if hasattr(node, "__qualname__") else type(node)
        return f"{named.__module__}.{named.__qualname__}"


def differences(old: Any, new: Any, free: tuple[str, ...] = FREE) -> list[str]:
    """Lines `- name: old` and `+ name: new` for all that differs between two descriptions.

    Names under `free` may differ.
    """
    a, b = dict(_flat(old)), dict(_flat(new))
    lines = []
    for name in sorted({**a, **b}):
        allowed = any(name == f or name.startswith(f"{f}.") for f in free)
        if not allowed and a.get(name, ...) != b.get(name, ...):
            lines += [f"- {name}: {a[name]!r}"] if name in a else []
            lines += [f"+ {name}: {b[name]!r}"] if name in b else []
    return lines


def _flat(node, prefix=""):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        if isinstance(value, dict | list) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _children(node: Any) -> dict[str, Any]:
    if isinstance(node, dict):
        return {str(name): value for name, value in node.items()}
    if isinstance(node, tuple) and any(dataclasses.is_dataclass(v) for v in node):
        return {str(i): value for i, value in enumerate(node)}
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return {}
    hidden = ("parent", "name") if isinstance(node, nn.Module) else ()
    names = [f.name for f in dataclasses.fields(node) if f.init and f.name not in hidden]
    return {name: getattr(node, name) for name in names}


def _replace(node, names, text, path):
    name, *rest = names
    children = _children(node)
    if name not in children:
        kind = type(node).__name__
        near = difflib.get_close_matches(name, children, n=1, cutoff=0.5)
        known = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(children)}"
        if not children:
            known = "it is a value"
        raise InputError(f"{path}: {kind} has no field {name!r}; {known}")
    old = children[name]
    new = _replace(old, rest, text, path) if rest else _parse(text, node, name, old, path)
    if isinstance(node, dict):
        return {**node, name: new}
    if isinstance(node, tuple):
        return tuple(new if str(i) == name else v for i, v in enumerate(node))
    return dataclasses.replace(node, **{name: new})


def _parse(text, node, name, old, path):
    try:
        new = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        new = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    hints = typing.get_type_hints(type(node)) if dataclasses.is_dataclass(node) else {}
    hint = hints.get(name, Any)
    if hint is Any and dataclasses.is_dataclass(old):
        inner = next(iter(_children(old)), None)
        remedy = f"set its fields, such as {path}.{inner}" if inner else "the config makes it"
        raise InputError(f"{path}: is a {type(old).__name__}, and no {text!r}; {remedy}")
    for value in (new, float(new) if type(new) is int else new, (new,), text, (text,)):
        if _fits(value, hint):
            return value
    raise InputError(f"{path}: expected {_spell(hint)}, got {text!r}")


def _fits(value, hint) -> bool:
    """Whether a literal is of the type that a field asks for."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in args
    if origin is dict:
        return value == {}  # leaves all of it out; entries are set by their names.
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        if len(args) == 2 and args[1] is ...:
            return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
        return isinstance(value, tuple) and len(value) == len(args)
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        return type(value) is hint
    # What a literal makes is of a plain type, though it may have a protocol's methods too.
    plain = isinstance(hint, type) and hint.__module__ == "builtins"
    return plain and isinstance(value, hint)


def _spell(hint) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
