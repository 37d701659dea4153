"""Mixture of experts: a router sends each token to a few of many MLPs.

Sources: Shazeer et al. 2017 (arXiv 1701.06538), GShard (2006.16668), Switch (2101.03961),
Mixtral (2401.04088).
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.einsum import Einsum, fan_in
from jaxformer.ops.activation import silu
from jaxformer.sharding import partitioned


@dataclasses.dataclass(frozen=True)
class Experts:
    """How many experts there are, and who is sent to which.

    A token goes to the `top_k` of `count` that the router prefers; `renormalise` makes
    their weights sum to 1.
    """

    count: int
    top_k: int
    renormalise: bool = True


class Kernels(nn.Module):
    """A kernel for each expert, `[E, inputs, outputs]`."""

    letters: str

    @nn.compact
    def __call__(self, shape: tuple[int, int, int]) -> Float[Array, "E I O"]:
        init = fan_in(1.0, "fan_in", "truncated_normal", 1, 2, batch_axis=(0,))
        return self.param("kernel", partitioned(init, self.letters), shape)


class Moe(nn.Module):
    """A gated MLP of `width` a token, of which there are `experts.count`."""

    width: int
    experts: Experts
    activation: Callable[[Array], Array] = silu
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool = False):
        D, E, F = x.shape[-1], self.experts.count, self.width
        # In float32: near ties are decided here.
        router = Einsum("BTD,DE->BTE", {"E": E}, dtype=jnp.float32, name="router")
        probability = jax.nn.softmax(router(x.astype(jnp.float32)))
        weight, chosen = jax.lax.top_k(probability, self.experts.top_k)
        if self.experts.renormalise:
            weight /= weight.sum(-1, keepdims=True)

        gate, up = (
            Kernels("EDF", name=name)((E, D, F)).astype(self.dtype) for name in ("gate", "up")
        )
        down = Kernels("EFD", name="down")((E, F, D)).astype(self.dtype)
        x = x.astype(self.dtype)
        h = self.activation(jnp.einsum("BTD,EDF->EBTF", x, gate))
        h *= jnp.einsum("BTD,EDF->EBTF", x, up)
        each = jnp.einsum("EBTF,EFD->EBTD", h, down)
        share = (jax.nn.one_hot(chosen, E) * weight[..., None]).sum(-2)  # [B, T, E]
        return jnp.einsum("BTE,EBTD->BTD", share.astype(self.dtype), each)
