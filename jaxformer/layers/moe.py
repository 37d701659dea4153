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

        init = fan_in(1.0, "fan_in", "truncated_normal", 1, 2, batch_axis=(0,))

        def kernel(name: str, letters: str, shape: tuple[int, ...]) -> Array:
            found = self.param(f"{name}_kernel", partitioned(init, letters), shape)
            return found.astype(self.dtype)

        gate, up = (kernel(name, "EDF", (E, D, F)) for name in ("gate", "up"))
        down = kernel("down", "EFD", (E, F, D))
        x = x.astype(self.dtype)
        h = self.activation(jnp.einsum("BTD,EDF->EBTF", x, gate))
        h *= jnp.einsum("BTD,EDF->EBTF", x, up)
        each = jnp.einsum("EBTF,EFD->EBTD", h, down)
        share = (jax.nn.one_hot(chosen, E) * weight[..., None]).sum(-2)  # [B, T, E]
        return jnp.einsum("BTE,EBTD->BTD", share.astype(self.dtype), each)
