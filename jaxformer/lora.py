"""LoRA: beside kernels that stay as they are, two thin matrices for each that learn.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, PyTree

from jaxformer.errors import InputError
from jaxformer.muon import muon_dimensions
from jaxformer.optim import under

DOWN, UP = "down/kernel", "up/kernel"


class Lora(nn.Module):
    """A model with `kernel + alpha / rank * down @ up` in the place of hidden kernels.

    Its parameters are `{"model": those of the model, "lora": ...}`; it is called as the
    model is, methods and all. What trains is told to the optimizer: `optim.Parts(recipe,
    ("lora",))` has state for the thin matrices alone. `up` begins with zeros, so that at first
    it is the model to the bit. `merged(params)` are plain parameters of the model.

    The kernels are the hidden matrices (those that `muon.muon_dimensions` finds) under `names`:
    paths, or their first parts, such as `language/stack`; all of them where none is given.
    They are added up before they are used: a gradient is as large as the kernel's for a
    moment, but there is no state of the optimizer for it.

    Raises:
      InputError: from `init`, there is no hidden matrix, or none under one of the names, or
        a rank below 1.
    """

    model: nn.Module
    rank: int = 8
    alpha: float = 16.0
    names: tuple[str, ...] = ()

    @property
    def vocab(self) -> int:
        """That of the model."""
        model: Any = self.model
        return model.vocab

    @nn.nowrap
    def init(self, rngs: Any, *inputs: Any, **options: Any) -> dict[str, Any]:
        """As `nn.Module.init`."""
        variables: Any = self.model.init(rngs, *inputs, **options)
        key = rngs["params"] if isinstance(rngs, dict) else rngs
        made = self._thin(variables["params"], key)
        return {**variables, "params": {"model": variables["params"], "lora": made}}

    @nn.nowrap
    def apply(self, variables: Any, *inputs: Any, **options: Any) -> Any:
        """As `nn.Module.apply`."""
        variables = {**variables, "params": self.merged(variables["params"])}
        return self.model.apply(variables, *inputs, **options)

    @nn.nowrap
    def merged(self, params: PyTree) -> PyTree:
        """Plain parameters of the model, of all of this one's."""
        flat: dict[str, Any] = traverse_util.flatten_dict(params["model"], sep="/")
        thin: dict[str, Any] = traverse_util.flatten_dict(params["lora"], sep="/")
        for path in [name.removesuffix(DOWN) for name in thin if name.endswith(DOWN)]:
            kernel = flat[f"{path}kernel"]
            more = product(thin[path + DOWN], thin[path + UP], kernel.shape)
            more *= self.alpha / self.rank
            flat[f"{path}kernel"] = kernel + more.astype(kernel.dtype)
        return traverse_util.unflatten_dict(flat, sep="/")

    def _thin(self, params: PyTree, key: Array) -> PyTree:
        """Both matrices of each kernel that is to learn, with their logical axes."""
        if self.rank < 1:
            raise InputError(f"rank={self.rank} must be 1 or more")
        axes = nn.get_partition_spec(params)
        dimensions: Any = traverse_util.flatten_dict(muon_dimensions(axes), sep="/")
        hidden = [path for path, numbers in dimensions.items() if numbers is not None]
        if not hidden:
            raise InputError(
                f"{type(self.model).__name__} has no hidden matrix for LoRA to stand beside; "
                "train its kernels themselves"
            )
        for name in self.names:
            if not any(under(path, name) for path in hidden):
                raise InputError(
                    f"names: no hidden matrix is under {name!r}; there are {', '.join(hidden)}"
                )
        flat: Any = traverse_util.flatten_dict(nn.unbox(params), sep="/")
        specs: Any = traverse_util.flatten_dict(axes, sep="/")
        found = {}
        for number, path in enumerate(hidden):
            if self.names and not any(under(path, name) for name in self.names):
                continue
            shape, spec, numbers = flat[path].shape, tuple(specs[path]), dimensions[path]
            first, last = numbers.reduction_axis[0], numbers.output_axis[0]
            down = (*shape[:last], self.rank), (*spec[:last], None)
            up = (*shape[:first], self.rank, *shape[last:]), (*spec[:first], None, *spec[last:])
            std = math.prod(shape[first:last]) ** -0.5
            values = {
                DOWN: std * jax.random.normal(jax.random.fold_in(key, number), down[0]),
                UP: jnp.zeros(up[0]),
            }
            for name, names in ((DOWN, down[1]), (UP, up[1])):
                box = nn.LogicallyPartitioned(values[name], names)
                found[path.removesuffix("kernel") + name] = box
        return traverse_util.unflatten_dict(found, sep="/")


def plain(model: Any) -> Any:
    """The model within a `Lora`, or the model itself: what knows its sizes."""
    return model.model if isinstance(model, Lora) else model


def product(
    down: Float[Array, "..."], up: Float[Array, "..."], shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """`[*L, *I, r]` by `[*L, r, *O]` as `[*L, *I, *O]`, of `shape`; `L` stack matrices."""
    stacked = down.ndim + up.ndim - 2 - len(shape)
    lead, rank = shape[:stacked], down.shape[-1]
    return (down.reshape(*lead, -1, rank) @ up.reshape(*lead, rank, -1)).reshape(shape)
