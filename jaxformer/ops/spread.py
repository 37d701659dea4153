"""Attention over a mesh: kernels see one device's heads and rows, and all of its keys.

XLA cannot cut a kernel in pieces, `jax.shard_map` can: the batch and the heads lie as the
rules in force say. With the sequence sharded, queries stay where they are and keys and
values are gathered, which for grouped heads is the smaller part; ranges of keys belong to
queries and lie with them.
"""

import dataclasses

import jax
from jax.sharding import PartitionSpec as P

from jaxformer import sharding
from jaxformer.kernels.case import Case
from jaxformer.ops.choose import How
from jaxformer.ops.dense import join, split
from jaxformer.ops.mask import Mask
from jaxformer.ops.primitive import attention


def spread(q, k, v, case: Case, mask: Mask | None, how: How):
    """`primitive.attention`, on each device its part of it where rules are in force."""
    mesh = jax.sharding.get_abstract_mesh()
    # Where axes are manual, the caller has cut the arrays: this is one device's part.
    place = None if mesh.empty or mesh.manual_axes else sharding.place(q.shape, "BTNH")
    if place is None or mesh.size == 1:
        return attention(q, k, v, case, mask, how)
    b, t, n, _ = place
    parts = sharding.ways(mesh, t)
    if mask is not None or (parts > 1 and case.slopes is not None):
        # XLA cuts its own attention, which any mesh suits.
        why_not = "ALiBi over a sharded sequence" if mask is None else how.why_not
        return attention(q, k, v, case, mask, dataclasses.replace(how, why_not=why_not))
    if parts > 1:
        how, case = (
            dataclasses.replace(how, causal=False),
            dataclasses.replace(case, known=None),
        )
    sharding.place(k.shape, "BTKH" if k.shape[1] == q.shape[1] else "B_KH")
    s = t if k.shape[1] % parts == 0 else None
    learned, rest = split(q, k, v, case)

    def row(x, *more):
        """Of an array whose batch is 1 or B; None where there is none."""
        return None if x is None else P(b if x.shape[0] == q.shape[0] else None, *more)

    heads = n if case.bias is not None and case.bias.shape[1] == q.shape[2] else None
    leaves, tree = jax.tree.flatten((learned, rest))
    places = [
        *(P(b, t, n), P(b, s, n), P(b, s, n), row(learned.bias, heads, t)),
        *(None if x is None else P() for x in list(vars(learned).values())[4:]),
        *(row(rest.q.cos, t), row(rest.q.sin, t), row(rest.k.cos), row(rest.k.sin)),
        row(rest.intervals, None, t),
        None if rest.slopes is None else P(n),
    ]
    places = [where for where in places if where is not None]

    def part(leaves):
        q, k, v, case = join(*jax.tree.unflatten(tree, leaves))
        if s is not None and parts > 1:
            k, v = (jax.lax.all_gather(x, t, axis=1, tiled=True) for x in (k, v))
        return attention(q, k, v, case, None, how)

    lies = {"in_specs": (places,), "out_specs": (P(b, t, n), P(b, n, t))}
    return jax.shard_map(part, check_vma=False, **lies)(leaves)
