"""Models of other libraries as ours, and ours as theirs.

`load(path)` reads a directory as Hugging Face saves it; `save(path, model, params)` writes
one that Hugging Face loads. The families are in `families`, each in a file of its own.
"""

import pathlib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxformer.convert import engine, files
from jaxformer.convert.families import FAMILIES, kind_of
from jaxformer.errors import InputError
from jaxformer.sharding import FSDP_TENSOR, Rules


def load(
    path: str | pathlib.Path,
    *,
    mesh: Mesh | None = None,
    rules: Rules = FSDP_TENSOR,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> tuple[nn.Module, Any]:
    """The model and the parameters of a directory with `config.json` and safetensors.

    Files are read a piece at a time, straight to the devices that hold it.

    Args:
      path: the directory.
      mesh: where the parameters lie; the first device if not given.
      rules: which logical axis lies on which axis of the mesh.
      dtype: what the model computes in.
      param_dtype: what the parameters are kept in.

    Raises:
      InputError: an architecture that is not known; a file that is damaged; tensors that
        are missing, unknown, or of another shape, all in one error.
    """
    path = pathlib.Path(path)
    config = files.read_config(path)
    kind = kind_of(config)
    if kind not in FAMILIES:
        raise InputError(
            f"{path}: model_type {kind!r} is not known; known are {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[kind]
    tensors = family.tensors(config, files.open_tensors(path))
    model = family.model(config, set(tensors), dtype)
    params = engine.read(
        family, model, tensors, mesh=mesh, rules=rules, dtype=param_dtype, where=str(path)
    )
    return model, params


def save(
    path: str | pathlib.Path,
    model: nn.Module,
    params: Any,
    *,
    kind: str | None = None,
    shard_bytes: int = files.SHARD_BYTES,
) -> None:
    """Writes `config.json` and safetensors as Hugging Face reads them.

    Args:
      path: the directory, made if it is not there.
      model: what `load` gave, or any model that a family can write.
      params: its parameters.
      kind: the family, a `model_type`; the first that the model fits if not given.
      shard_bytes: how much one file holds at most.

    Raises:
      InputError: no family fits the model; parameters that are not its own.
    """
    if kind is not None and kind not in FAMILIES:
        raise InputError(f"kind={kind!r} is not known; known are {', '.join(sorted(FAMILIES))}")
    parts = getattr(model, "parts", None)  # A model that is told by numbers alone.
    model = model if parts is None else parts()
    for family in [FAMILIES[kind]] if kind else FAMILIES.values():
        config = family.config(model)
        if config is not None and engine.is_told_by(config, family, model):
            tensors = engine.tensors_of(family, model, params)
            files.write(pathlib.Path(path), config, tensors, shard_bytes)
            return
    subject = f"{kind} cannot" if kind else "no family can"
    raise InputError(
        f"{subject} hold this {type(model).__name__}: its parts are not those of "
        f"{kind or 'any of ' + ', '.join(sorted(FAMILIES))}"
    )
