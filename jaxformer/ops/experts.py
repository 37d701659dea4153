"""Tokens to experts and back: who goes where, and two ways to bring them there.

`dropless` computes every choice of every token: rows sorted by expert, and one ragged
product. `limited` gives each expert room for so many tokens of a row, in arrays that lie
by expert, to which devices send tokens all to all; what finds no room is left out.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxformer.sharding import constrain, mesh_names, place

Kernels = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]


class Route(struct.PyTreeNode):
    """Where tokens go: `expert` `[B, T, k]` in falling order, and by what it is weighed."""

    expert: Int[Array, "B T k"]
    weight: Float[Array, "B T k"]


def route(logits: Float[Array, "B T E"], top_k: int, *, renormalise: bool = True) -> Route:
    """The `top_k` experts of each token by a softmax over all; ties go to the first.

    `renormalise` makes the weights of a token sum to 1 (Mixtral, arXiv 2401.04088).
    """
    weight, expert = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), top_k)
    if renormalise:
        weight /= weight.sum(-1, keepdims=True)
    return Route(expert, weight)


def balance_loss(logits: Float[Array, "B T E"], routed: Route) -> Float[Array, ""]:
    """`E * sum(share of choices * mean probability)` over experts: `k` where all are alike.

    Source: Switch Transformers, arXiv 2101.03961, of `k` choices as transformers has it.
    """
    E = logits.shape[-1]
    chosen = jax.nn.one_hot(routed.expert, E).sum(2).mean((0, 1))
    return E * (chosen * jax.nn.softmax(logits.astype(jnp.float32)).mean((0, 1))).sum()


def z_loss(logits: Float[Array, "B T E"]) -> Float[Array, ""]:
    """The mean square of the router's logsumexp. Source: ST-MoE, arXiv 2202.08906."""
    return jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), -1)).mean()


def dropless(
    x: Float[Array, "B T D"], routed: Route, kernels: Kernels, activation: Callable
) -> Float[Array, "B T D"]:
    """The weighed sum of the experts of each token, `down(activation(gate x) * up x)`.

    Under the rules of `sharding.use` each device computes its own experts, of all tokens
    of those that share its part of the batch: tokens are gathered and results are summed.
    """
    gate, _, down = kernels
    where = place(x.shape, "BTD")
    wide, narrow = place(gate.shape, "EDF"), place(down.shape, "EFD")
    if where is None or wide is None:
        return _sorted(x, routed, kernels, activation, 0)
    ways = mesh_names(wide[0])  # mesh axes of experts
    shared = tuple(name for name in mesh_names(where[0]) if name in ways)
    summed = tuple(n for n in (*ways, *mesh_names(wide[2])) if n not in shared)

    def own(x, expert, weight, gate, up, down):
        parts = (x, expert, weight)
        if shared:
            parts = (jax.lax.all_gather(part, shared, tiled=True) for part in parts)
        x, expert, weight = parts
        first = jax.lax.axis_index(ways) * len(gate) if ways else 0
        y = _sorted(x, Route(expert, weight), (gate, up, down), activation, first)
        y = jax.lax.psum(y, summed) if summed else y
        return jax.lax.psum_scatter(y, shared, tiled=True) if shared else y

    mesh = jax.sharding.get_abstract_mesh()
    run = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(where, where, where, wide, wide, narrow),
        out_specs=where,
        check_vma=False,
    )
    return run(x, routed.expert, routed.weight, *kernels)


def _sorted(x, routed: Route, kernels, activation, first) -> Float[Array, "B T D"]:
    """What the experts from number `first` on add to each token."""
    gate, up, down = kernels
    B, T, D = x.shape
    E, k = len(gate), routed.expert.shape[-1]
    number = routed.expert.reshape(-1) - first
    mine = (number >= 0) & (number < E)
    order = jnp.argsort(jnp.where(mine, number, E))
    sizes = jnp.bincount(jnp.where(mine, number, E), length=E + 1)[:E].astype(jnp.int32)
    rows = x.reshape(-1, D)[order // k]

    def product(rows: Array, kernel: Array) -> Array:
        return jax.lax.ragged_dot(rows, kernel, sizes)

    h = activation(product(rows, gate)) * product(rows, up)
    y = product(h, down)
    y = jnp.where(mine[order][:, None], y, 0)  # Rows of no group hold what they will.
    y = y[jnp.argsort(order)].reshape(B, T, k, D)
    weight = jnp.where(mine.reshape(B, T, k), routed.weight, 0)
    return (y * weight[..., None].astype(y.dtype)).sum(2)


def limited(
    x: Float[Array, "B T D"],
    routed: Route,
    kernels: Kernels,
    activation: Callable,
    capacity: float,
) -> Float[Array, "B T D"]:
    """`dropless`, but an expert takes `capacity * T * k / E` tokens of a row at most.

    First choices go before second ones, and earlier tokens before later ones. With
    `capacity=E / k` nothing is left out. Source: GShard, arXiv 2006.16668.
    """
    gate, up, down = kernels
    (B, T, D), k, E = x.shape, routed.expert.shape[-1], len(gate)
    C = min(max(math.ceil(capacity * T * k / E), 1), T)
    expert = routed.expert.swapaxes(1, 2).reshape(B, k * T)
    taken = jax.nn.one_hot(expert, E, dtype=jnp.int32).cumsum(1)
    slot = jnp.take_along_axis(taken, expert[..., None], 2)[..., 0] - 1
    fits = slot < C
    row = jnp.arange(B)[:, None]
    token = jnp.tile(jnp.arange(T), k)[None]

    rooms = jnp.zeros((B, E, C, D), x.dtype)
    rooms = rooms.at[row, expert, jnp.where(fits, slot, C)].set(x[row, token], mode="drop")
    rooms = constrain(constrain(rooms, "BECD").swapaxes(0, 1), "EBCD")
    h = activation(jnp.einsum("EBCD,EDF->EBCF", rooms, gate))
    h = constrain(h * jnp.einsum("EBCD,EDF->EBCF", rooms, up), "EBCF")
    y = constrain(jnp.einsum("EBCF,EFD->EBCD", h, down), "EBCD").swapaxes(0, 1)
    y = constrain(y, "BECD")[row, expert, jnp.minimum(slot, C - 1)]
    weight = jnp.where(fits, routed.weight.swapaxes(1, 2).reshape(B, k * T), 0)
    y *= weight[..., None].astype(y.dtype)
    return y.reshape(B, k, T, D).sum(1)
