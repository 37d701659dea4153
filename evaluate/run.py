"""Evaluation that is exact on any mesh: sums over every example, padding weighs 0."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxformer import metrics
from jaxformer.data.loader import Pipeline, eval_batches, to_mesh


def evaluate(
    measure: Callable[[Any, dict], metrics.Metrics],
    params: Any,
    batches: Iterable[dict],
    batch_sharding: jax.sharding.Sharding,
) -> metrics.Metrics:
    """Adds up `measure(params, batch)` over all batches; the sums are 64-bit."""
    total = None
    for batch in batches:
        part = metrics.to_host(measure(params, to_mesh(batch, batch_sharding)))
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


def scalars(found: metrics.Metrics) -> dict[str, float]:
    """The metrics that are single numbers."""
    values = {name: metric.value() for name, metric in found.items()}
    return {name: value for name, value in values.items() if isinstance(value, float)}
