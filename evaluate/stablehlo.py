"""A trained model as one file of StableHLO, which JAX alone runs, without code of ours."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax import export

from jaxformer.errors import InputError

PLATFORMS = ("cpu", "tpu")
LIMIT = 2 << 30  # bytes, beyond which MLIR does not hold what is constant.


def artefact(
    model: nn.Module,
    params: Any,
    inputs: Sequence[Any],
    batch_size: int,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """The forward pass with its parameters inside, for one device and batches of one size.

    `jax.export.deserialize(bytearray(data)).call(*arrays)` runs it.

    Args:
      model: called with arrays.
      params: of any placement; this process must see all of them.
      inputs: arrays or shapes of the model's inputs, of which the batch does not count.
      batch_size: of the inputs that it takes.
      platforms: that it is compiled for when it is called.

    Raises:
      InputError: the parameters do not fit into a file.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    if size > LIMIT:
        raise InputError(
            f"the parameters take {size / 2**30:.1f} GB, and StableHLO holds {LIMIT >> 30}; "
            "--export writes models of any size"
        )
    if jax.process_count() > 1:
        raise InputError("an artefact is of one process; run the command without the others")
    params = jax.device_put(jax.device_get(params), jax.local_devices()[0])

    def forward(*inputs):
        return model.apply({"params": params}, *inputs)

    shapes = [jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for x in inputs]
    return bytes(export.export(jax.jit(forward), platforms=platforms)(*shapes).serialize())
