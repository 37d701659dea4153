"""Mixture of experts: a router sends each token to a few of many MLPs.

Sources: Shazeer et al. 2017 (arXiv 1701.06538), GShard (2006.16668), Switch (2101.03961),
Mixtral (2401.04088); shared experts as DeepSeekMoE (2401.06066) has them.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.layers.einsum import Einsum, fan_in
from jaxformer.ops.activation import silu
from jaxformer.ops.experts import balance_loss, dropless, limited, route, z_loss
from jaxformer.sharding import constrain, partitioned


@dataclasses.dataclass(frozen=True)
class Experts:
    """How many experts there are, and who is sent to which.

    A token goes to the `top_k` of `count` that the router prefers; `renormalise` makes
    their weights sum to 1. With a `capacity` an expert takes so many times its share of
    the tokens of a row, and no more; None is all that come. `balance` and `z` weigh two
    losses of the router, see `ops.experts`.
    """

    count: int
    top_k: int
    renormalise: bool = True
    capacity: float | None = None
    balance: float = 0.0
    z: float = 0.0

    def __post_init__(self):
        if not 1 <= self.top_k <= self.count:
            raise ValueError(f"top_k={self.top_k} must lie in 1 to count={self.count}")


class Kernels(nn.Module):
    """A kernel for each expert, `[E, inputs, outputs]`."""

    letters: str

    @nn.compact
    def __call__(self, shape: tuple[int, ...]) -> Float[Array, "E I O"]:
        init = fan_in(1.0, "fan_in", "truncated_normal", 1, 2, batch_axis=(0,))
        return self.param("kernel", partitioned(init, self.letters), shape)


class Moe(nn.Module):
    """A gated MLP of `width`, of which there are `experts.count`; each token takes a few.

    `shared`, where it is given, is an MLP that all tokens take besides. The router is
    float32. Where the collection "losses" is mutable it receives `balance` and `z`, each
    times its weight: add all of it to the loss.
    """

    width: int
    experts: Experts
    activation: Callable[[Array], Array] = silu
    shared: nn.Module | None = None
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, train: bool = False
    ) -> Float[Array, "B T D"]:
        D, E, F, how = x.shape[-1], self.experts.count, self.width, self.experts
        router = Einsum("BTD,DE->BTE", {"E": E}, dtype=jnp.float32, name="router")
        logits = router(x.astype(jnp.float32))  # Near ties are decided here.
        routed = route(logits, how.top_k, renormalise=how.renormalise)
        if not self.is_initializing():
            if how.balance:
                self.sow("losses", "balance", how.balance * balance_loss(logits, routed))
            if how.z:
                self.sow("losses", "z", how.z * z_loss(logits))

        def kernel(name: str, letters: str, *shape: int) -> Array:
            return Kernels(letters, name=name)(shape).astype(self.dtype)

        kernels = (
            kernel("gate", "EDF", E, D, F),
            kernel("up", "EDF", E, D, F),
            kernel("down", "EFD", E, F, D),
        )
        x = x.astype(self.dtype)
        if how.capacity is None:
            y = dropless(x, routed, kernels, self.activation)
        else:
            y = limited(x, routed, kernels, self.activation, how.capacity)
        if self.shared is not None:
            y += self.shared(x, train=train)
        return constrain(y, "BTD")
