"""The one linear layer."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.sharding import constrain, partitioned

fan_in = nn.initializers.variance_scaling


class Einsum(nn.Module):
    """A linear map written as the einsum it computes.

    `Einsum("BTD,DNH->BTNH", dict(N=8, H=64))(x)`: the letters give the kernel its shape,
    its fan-in (the letters summed away), its logical axes, and the result its place on
    the mesh. Kernel letters stand as inputs, then outputs. It lowers to one product of
    matrices: letters that are summed become one, and so do letters that are made.
    """

    equation: str
    sizes: Mapping[str, int]
    use_bias: bool = False
    dtype: DTypeLike = jnp.bfloat16
    kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        inputs, kernel_letters, outputs = self.equation.replace("->", ",").split(",")
        sizes = dict(zip(inputs, x.shape, strict=True)) | dict(self.sizes)
        summed = "".join(c for c in kernel_letters if c not in outputs)
        made = kernel_letters[len(summed) :]
        lead = inputs.removesuffix(summed)
        if kernel_letters != summed + made or inputs + outputs != lead + summed + lead + made:
            raise ValueError(
                f"Einsum takes 'xI,IO->xO', the summed and the made letters last and in "
                f"the kernel's order; got {self.equation!r}"
            )
        init = self.kernel_init or fan_in(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=range(len(summed)),
            out_axis=range(len(summed), len(kernel_letters)),
        )
        shape = [sizes[c] for c in kernel_letters]
        kernel = self.param("kernel", partitioned(init, kernel_letters), shape)
        rows = math.prod(shape[: len(summed)])
        kernel = jnp.asarray(kernel, self.dtype).reshape(rows, -1)
        y = x.astype(self.dtype).reshape(*x.shape[: len(lead)], rows) @ kernel
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, made)
            bias = self.param("bias", zeros, shape[len(summed) :])
            y += jnp.asarray(bias, self.dtype).reshape(-1)[(None,) * len(lead)]
        y = y.reshape(*x.shape[: len(lead)], *shape[len(summed) :])
        return constrain(y, outputs)
