"""vmap of the primitives of attention: the mapped axis becomes part of the batch.

Where an operand without a batch is mapped, such as the weights of a norm, or would need a
gradient for each of the mapped, the primitive runs in a loop instead.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxformer.ops.mask import Mask

# How an operand carries the batch: "B" has it, "1" or "b" has it or a 1 there, "0" has none.
# In the order of the fields of `Gradients`: q, k, v, bias and four weights of norms.
LEARNED = "BBBb0000"


class Tiled(Mask):
    """A mask of which the rows of the batch come `times` times, one after the other."""

    mask: Mask
    times: int = struct.field(pytree_node=False)

    def visible(self, q, k, lengths):
        seen = self.mask.visible(q, k, lengths)
        return jnp.tile(seen, (self.times, 1, 1)) if seen.shape[0] > 1 else seen


def batched(primitive, args, dims, **params):
    """The batching rule of the three primitives; see `primitive` for their operands."""
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    learned, kinds = _kinds(args, params["trees"], params.get("wanted"))
    args = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
    mapped = [d is not None for d in dims]
    back = "with_lse" in params
    loose = any(kind == "0" and m for kind, m in zip(kinds, mapped, strict=True))
    if loose or (back and "0" in learned):
        return _loop(primitive, args, mapped, params)
    B = args[0].shape[mapped[0]]

    learns = (back and not params["fixed_bias"]) or "wanted" in params

    def fold(x, kind, mapped):
        # A bias has the shape of its tangent and of its gradient: all are made whole.
        whole = kind == "B" or (kind == "b" and learns)
        if kind == "0" or not (mapped or whole or x.shape[0] > 1):
            return x
        x = x if mapped else x[None]
        x = jnp.broadcast_to(x, (size, B, *x.shape[2:]))
        return x.reshape(size * B, *x.shape[2:])

    params |= {"trees": _tiled(args, params["trees"], size)}
    whole = map(fold, args, kinds, mapped)

    def unfold(x):
        if x.shape[0] == size * B:
            return x.reshape(size, B, *x.shape[1:])
        return jnp.broadcast_to(x, (size, *x.shape))  # The gradient of a bias that has none.

    out = [unfold(x) for x in primitive.bind(*whole, **params)]
    if back:
        shapes = [x.shape[m:] for x, m in zip(args, mapped, strict=True)]
        out = [
            x.sum(1, keepdims=True) if shape[0] < B else x
            for x, shape in zip(out, shapes, strict=False)
        ]
    return out, [0] * len(out)


def _tiled(args, trees, times: int):
    """The trees of the operands where a mask that no interval holds is as long as they."""
    n, m = (tree.num_leaves for tree in trees)
    case, mask = jax.tree.unflatten(trees[1], args[n : n + m])
    if mask is None:
        return trees
    return trees[0], jax.tree.structure((case, Tiled(mask, times)))


def _loop(primitive, args, mapped, params):
    def one(some):
        some = iter(some)
        each = [next(some) if m else x for x, m in zip(args, mapped, strict=True)]
        return primitive.bind(*each, **params)

    out = jax.lax.map(one, [x for x, m in zip(args, mapped, strict=True) if m])
    return out, [0] * len(out)


def _kinds(args, trees, wanted) -> tuple[list[str], list[str]]:
    """The kinds of the learned operands, and of all."""
    n, m = (tree.num_leaves for tree in trees)
    given = vars(jax.tree.unflatten(trees[0], args[:n])).values()
    learned = [kind for x, kind in zip(given, LEARNED, strict=True) if x is not None]
    case, _ = jax.tree.unflatten(trees[1], args[n : n + m])
    turns = jax.tree.leaves((case.q, case.k, case.intervals))
    constants = ["1"] * len(turns) + ["0"] * (m - len(turns))  # As their fields stand.
    moving = [kind for kind, w in zip(learned, wanted, strict=True) if w] if wanted else []
    between = ["B"] * (len(args) - n - m - len(moving))
    return learned, learned + constants + between + moving
