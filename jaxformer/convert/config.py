"""Their config.json, read with one sentence for whatever is wrong with it."""

from collections.abc import Callable, Mapping
from typing import Any

from jax import Array

from jaxformer.errors import InputError
from jaxformer.ops import activation

# Their names of activations; the first that names one of ours is written.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": activation.gelu,
    "gelu_pytorch_tanh": activation.gelu_tanh,
    "gelu_new": activation.gelu_tanh,
    "gelu_fast": activation.gelu_tanh,
    "quick_gelu": activation.quick_gelu,
    "relu": activation.relu,
    "silu": activation.silu,
    "swish": activation.silu,
}


def number(config: Mapping[str, Any], name: str, default: int | float) -> Any:
    """A positive number of the config, or `default`, whose type it must have.

    Raises:
      InputError: it is no positive number.
    """
    value = config.get(name)
    value = default if value is None else value
    kind = (int, float) if isinstance(default, float) else int
    if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
        raise InputError(
            f"config.json: {name}={value!r} must be a positive {type(default).__name__}"
        )
    return type(default)(value)


def pair(config: Mapping[str, Any], name: str, default: int) -> tuple[int, int]:
    """A size: one number for a square, or (rows, columns)."""
    value = config.get(name, default)
    if isinstance(value, list | tuple) and len(value) == 2:
        first, second = (number({name: v}, name, default) for v in value)
        return first, second
    side = number(config, name, default)
    return side, side


def activation_of(config: Mapping[str, Any], name: str, default: str) -> Callable:
    """The activation that a config names.

    Raises:
      InputError: it is none of those known.
    """
    value = config.get(name, default)
    if value not in ACTIVATIONS:
        raise InputError(
            f"config.json: {name}={value!r} is not known; known are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[value]


def name_of(function: Callable) -> str | None:
    """What they call an activation of ours, or None."""
    return next((name for name, f in ACTIVATIONS.items() if f is function), None)


def classes(config: Mapping[str, Any]) -> int:
    """How many labels a classifier has: 2 where the config says nothing, as theirs do."""
    labels = config.get("id2label")
    return len(labels) if labels else number(config, "num_labels", 2)


def labels(count: int) -> dict[str, Any]:
    """What a config says of `count` labels without names."""
    names = [f"LABEL_{i}" for i in range(count)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config within a config."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise InputError(f"config.json: {name} must be an object, not {found!r}")
    return dict(found)
