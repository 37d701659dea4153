"""A comparison with an original: the tiny model, its inputs, and what must be equal."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.convert import engine, files
from jaxformer.convert.families import FAMILIES, kind_of

RECORDED = pathlib.Path(__file__).parent / "recorded"
TOLERANCE = 1e-5  # of outputs, absolute.
GRADIENT_TOLERANCE = 1e-4  # of each parameter's gradient, by its largest entry.


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
      name: the directory under `recorded/`.
      original: makes the torch model, with torch imported inside.
      inputs: makes the inputs from a NumPy generator, as ours take them.
      theirs: (module, inputs) -> named outputs, torch tensors with a gradient.
      ours: (model, variables, inputs) -> the same, as arrays.
      mutations: name of a fact -> (model, inputs) -> (model, inputs) that has it wrong;
        with any of them the outputs must differ.
      scales: substring of a tensor's name -> factor on its random values.
      gradients: whether gradients are compared; some outputs have none.
      hub: regular expressions and replacements of tensors' names, where transformers
        writes others than those on the hub; it must load these.
      slow: left to the slow tests: what it has more than another is little.
    """

    name: str
    original: Callable[[], Any]
    inputs: Callable[[np.random.Generator], dict[str, np.ndarray]]
    theirs: Callable[[Any, dict[str, Any]], dict[str, Any]]
    ours: Callable[[Any, Any, dict[str, Any]], dict[str, Any]]
    mutations: Mapping[str, Callable[[Any, dict], tuple[Any, dict]]] = dataclasses.field(
        default_factory=dict
    )
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    gradients: bool = True
    hub: tuple[tuple[str, str], ...] = ()
    slow: bool = False

    @property
    def directory(self) -> pathlib.Path:
        """Where it is recorded."""
        return RECORDED / self.name

    @property
    def kind(self) -> str:
        """The family of what is recorded."""
        found = kind_of(files.read_config(self.directory))
        assert found is not None
        return found

    def answers(self) -> tuple[dict, dict]:
        """The recorded inputs and outputs."""
        with np.load(self.directory / "answers.npz", allow_pickle=False) as found:
            inputs = {k[3:]: found[k] for k in found if k.startswith("in:")}
            outputs = {k[4:]: found[k] for k in found if k.startswith("out:")}
        return inputs, outputs

    def gradient_of_theirs(self, model: Any) -> Any:
        """Their gradients as a tree like our parameters."""
        family = FAMILIES[self.kind]
        config = files.read_config(self.directory)
        tensors = family.tensors(config, files.open_tensors(self.directory / "gradients"))
        where = str(self.directory)
        options = {"mesh": None, "rules": (), "dtype": jnp.float32, "where": where}
        return engine.read(family, model, tensors, **options)


def weights(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Fixed weights of every output: their weighted sum is what gradients are of."""
    draw = np.random.default_rng(7)
    return {
        name: draw.normal(size=outputs[name].shape).astype(np.float32)
        for name in sorted(outputs)
    }


def total(outputs: Mapping[str, Any]) -> Any:
    """The weighted sum of all outputs."""
    w = weights(outputs)
    return sum(jnp.sum(outputs[name] * w[name]) for name in outputs)


def distance(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest difference of any output; infinite where shapes differ."""
    assert ours.keys() == theirs.keys()
    if any(ours[n].shape != theirs[n].shape for n in theirs):
        return float("inf")
    return max(float(np.abs(np.asarray(ours[n]) - theirs[n]).max()) for n in theirs)


def gradient_distance(ours: Any, theirs: Any) -> float:
    """The largest difference of any parameter's gradient, relative to its largest entry.

    Where that is a millionth of the largest of all it is rounding alone, and not compared:
    the bias of keys has no gradient, as a softmax sees no constant.
    """
    noise = 1e-6 * max(1.0, *(float(np.abs(b).max()) for b in jax.tree.leaves(theirs)))

    def one(a, b):
        top = np.abs(b).max()
        return float(np.abs(np.asarray(a) - b).max() / top) if top > noise else 0.0

    return max(jax.tree.leaves(jax.tree.map(one, ours, theirs)))


def edit(node: Any, path: str, value: Any) -> Any:
    """A copy of a module with the field at `a.b.c` replaced."""
    name, _, rest = path.partition(".")
    value = edit(getattr(node, name), rest, value) if rest else value
    return dataclasses.replace(node, **{name: value})


def wrong(path: str, value: Any) -> Callable[[Any, dict], tuple[Any, dict]]:
    """A mutation: one field of the model is another."""
    return lambda model, inputs: (edit(model, path, value), inputs)
