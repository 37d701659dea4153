"""What a kernel gives, as `pallas_call` is told it."""

from typing import Any

import jax
from jax import Array


def output(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """An array that varies over the devices of a `jax.shard_map` around it as `like` does."""
    kind = getattr(jax.typeof(like), "manual_axis_type", None)
    return jax.ShapeDtypeStruct(shape, dtype, **({"manual_axis_type": kind} if kind else {}))
