"""What tasks ask of a model: pure functions `(apply, params, batch) -> [B, D]`.

Any function of that kind will do; a config names one of these or writes its own.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from jaxformer.data.loader import Pipeline
from jaxformer.errors import InputError

Features = Callable[[Callable[..., Any], Any, dict[str, Array]], Array]


def pooled(apply: Callable[..., Any], params: Any, batch: dict[str, Array]) -> Array:
    """What a vision model's classifier would read: its method `features`."""
    return apply({"params": params}, batch["image"], method="features")


def image(apply: Callable[..., Any], params: Any, batch: dict[str, Array]) -> Array:
    """Where a model of images and texts puts an image: its method `encode_image`."""
    return apply({"params": params}, batch["image"], method="encode_image")


def text(apply: Callable[..., Any], params: Any, batch: dict[str, Array]) -> Array:
    """Where a model of images and texts puts `tokens`: its method `encode_text`."""
    return apply({"params": params}, batch["tokens"], method="encode_text")


def pixels(apply: Callable[..., Any], params: Any, batch: dict[str, Array]) -> Array:
    """The image itself, which no model has seen: what a probe has to beat."""
    return batch["image"].reshape(len(batch["image"]), -1)


def labelled(
    features: Features, apply: Callable[..., Any], params: Any, batch: dict[str, Array]
) -> tuple[Array, Array]:
    """Features with the labels beside them, to collect both."""
    return features(apply, params, batch), batch["label"]


def num_classes(pipeline: Pipeline) -> int:
    """How many classes the source of a pipeline has."""
    source: Any = pipeline.source  # Grain's protocol knows no classes, ours does.
    return source.num_classes


def check_classes(train: Pipeline, test: Pipeline) -> None:
    """Raises InputError where the classes of a test are not those of its training."""
    counts = [num_classes(pipeline) for pipeline in (train, test)]
    if counts[0] != counts[1]:
        raise InputError(
            f"{type(train.source).__name__} has {counts[0]} classes to learn from, "
            f"{type(test.source).__name__} {counts[1]} to test; give two splits of one source"
        )
