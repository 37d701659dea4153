"""Sums over every pair of a batch, of which no device ever holds more than a strip.

Of `B` images and `B` texts there are `B * B` pairs. Where the rules in force split the
batch over devices, images stay where they are and texts go around a ring of the devices
(`jax.lax.ppermute`); each block of pairs is walked in strips of `chunk` texts. So a device
holds `B / devices * chunk` pairs at once, which grows with the batch and not its square,
and backward passes walk again instead of keeping what the first walk saw.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from jaxformer import sharding

CHUNK = 1024
# By so much may two products of the same unit vectors differ: less is a tie.
TIE = 1e-6


@dataclasses.dataclass(frozen=True)
class _Walk:
    """How pairs are walked: texts at once, and over which devices they go around."""

    chunk: int
    mesh: Any = None
    axis: str | tuple[str, ...] | None = None


def _walk(q: Array, chunk: int) -> _Walk:
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be 1 or more; {CHUNK} is usual")
    mesh = jax.sharding.get_abstract_mesh()
    # Where axes are manual, the caller has cut the arrays: this is one device's part.
    place = None if mesh.empty or mesh.manual_axes else sharding.place(q.shape, "B_")
    if place is None or sharding.ways(mesh, place[0]) == 1:
        return _Walk(chunk)
    return _Walk(chunk, mesh, place[0])


def logsumexps(
    q: Float[Array, "B E"],
    k: Float[Array, "B E"],
    real: Int[Array, " B"],
    *,
    chunk: int = CHUNK,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """The logsumexp of every row of `q @ k.T`, and of every column.

    Exact, with exact gradients (in reverse mode alone), in float32.

    Args:
      q: one side of the pairs.
      k: the other.
      real: 0 for rows of padding, on both sides: as if they were not there. Their own
        results are -inf.
      chunk: how many of `k` a device looks at at once.
    """
    return _logsumexps(_walk(q, chunk), q, k, real)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logsumexps(walk, q, k, real):
    def tile(rows, columns):
        z = jnp.where(_both(rows, columns), _product(rows["x"], columns["x"]), -jnp.inf)
        return jax.nn.logsumexp(z, axis=1), jax.nn.logsumexp(z, axis=0)

    none = jnp.full(q.shape[:1], -jnp.inf)
    rows, columns = ({"x": x, "id": real} for x in (q, k))
    return _sweep(tile, jnp.logaddexp, rows, columns, (none, none), walk)


def _logsumexps_forward(walk, q, k, real):
    out = _logsumexps(walk, q, k, real)
    return out, (q, k, real, *out)


def _logsumexps_backward(walk, kept, d):
    q, k, real, row, column = kept

    def tile(rows, columns):
        z = _product(rows["x"], columns["x"])
        a = rows["d"][:, None] * jnp.exp(z - rows["lse"][:, None])
        b = columns["d"][None] * jnp.exp(z - columns["lse"][None])
        return _back(jnp.where(_both(rows, columns), a + b, 0), rows, columns)

    rows = {"x": q, "id": real, "lse": row, "d": d[0]}
    columns = {"x": k, "id": real, "lse": column, "d": d[1]}
    zeros = (jnp.zeros_like(q), jnp.zeros_like(k))
    return (*_sweep(tile, jnp.add, rows, columns, zeros, walk), None)


_logsumexps.defvjp(_logsumexps_forward, _logsumexps_backward)


def softplus_sums(
    q: Float[Array, "B E"],
    k: Float[Array, "B E"],
    bias: Float[Array, " B"],
    real: Int[Array, " B"],
    *,
    chunk: int = CHUNK,
) -> Float[Array, " B"]:
    """Of every row i the sum of softplus(q_i . k_j + bias_i) over all j but i itself.

    Exact, with exact gradients (in reverse mode alone), in float32; the arguments are
    those of `logsumexps`, and rows of padding give 0.
    """
    ids = real * (1 + jnp.arange(len(real)))
    return _softplus_sums(_walk(q, chunk), q, k, bias, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softplus_sums(walk, q, k, bias, ids):
    def tile(rows, columns):
        z = _product(rows["x"], columns["x"]) + rows["bias"][:, None]
        return jnp.where(_others(rows, columns), jax.nn.softplus(z), 0).sum(1), None

    rows, columns = {"x": q, "id": ids, "bias": bias}, {"x": k, "id": ids}
    return _sweep(tile, jnp.add, rows, columns, (jnp.zeros_like(bias), None), walk)[0]


def _softplus_sums_forward(walk, q, k, bias, ids):
    return _softplus_sums(walk, q, k, bias, ids), (q, k, bias, ids)


def _softplus_sums_backward(walk, kept, d):
    q, k, bias, ids = kept

    def tile(rows, columns):
        z = _product(rows["x"], columns["x"]) + rows["bias"][:, None]
        dz = jnp.where(_others(rows, columns), rows["d"][:, None] * jax.nn.sigmoid(z), 0)
        dq, dk = _back(dz, rows, columns)
        return (dq, dz.sum(1)), dk

    rows, columns = {"x": q, "id": ids, "bias": bias, "d": d}, {"x": k, "id": ids}
    zeros = ((jnp.zeros_like(q), jnp.zeros_like(bias)), jnp.zeros_like(k))
    (dq, dbias), dk = _sweep(tile, jnp.add, rows, columns, zeros, walk)
    return dq, dk, dbias, None


_softplus_sums.defvjp(_softplus_sums_forward, _softplus_sums_backward)


def ranks(
    q: Float[Array, "B E"],
    k: Float[Array, "B E"],
    real: Int[Array, " B"],
    *,
    chunk: int = CHUNK,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many other k are no further from q_i than its own k_i, and the other way round.

    0 is the nearest. Of unit vectors; ties (to 1e-6) and NaN count against us, so that no
    output is right by luck. The arguments are those of `logsumexps`.
    """
    own = (q * k).sum(-1) - TIE
    ids = real * (1 + jnp.arange(len(real)))

    def tile(rows, columns):
        z, others = _product(rows["x"], columns["x"]), _others(rows, columns)
        row = others & ~(z < rows["own"][:, None])
        column = others & ~(z < columns["own"][None])
        return row.sum(1, dtype=jnp.int32), column.sum(0, dtype=jnp.int32)

    rows, columns = ({"x": x, "id": ids, "own": own} for x in (q, k))
    zeros = jnp.zeros(own.shape, jnp.int32)
    return _sweep(tile, jnp.add, rows, columns, (zeros, zeros), _walk(q, chunk))


def _product(q: Array, k: Array) -> Array:
    return jnp.matmul(q, k.T, precision=jax.lax.Precision.HIGHEST)


def _back(dz: Array, rows: dict, columns: dict) -> tuple[Array, Array]:
    """From the gradient of a product to those of its two sides."""
    high = jax.lax.Precision.HIGHEST
    return (
        jnp.matmul(dz, columns["x"], precision=high),
        jnp.matmul(dz.T, rows["x"], precision=high),
    )


def _both(rows: dict, columns: dict) -> Array:
    return (rows["id"][:, None] > 0) & (columns["id"][None] > 0)


def _others(rows: dict, columns: dict) -> Array:
    return _both(rows, columns) & (rows["id"][:, None] != columns["id"][None])


def _sweep(
    tile: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    join: Callable[[Array, Array], Array],
    rows: PyTree,
    columns: PyTree,
    start: tuple[PyTree, PyTree],
    walk: _Walk,
) -> tuple[PyTree, PyTree]:
    """Joins what `tile` makes of all pairs of rows and columns, to `start`.

    Args:
      tile: (some rows, some columns) -> what it has for each row, and for each column.
        Columns of zeros are padding.
      join: associative: adds what one tile has to what another has.
      rows: arrays with a leading batch axis.
      columns: arrays with a leading batch axis, as long.
      start: what rows and columns have before, with a leading batch axis.
      walk: see `_Walk`.
    """
    ways = 1 if walk.mesh is None else sharding.ways(walk.mesh, walk.axis)
    ring = [(i, (i + 1) % ways) for i in range(ways)]

    def local(rows, columns, start):
        n = jax.tree.leaves(rows)[0].shape[0]
        parts = math.ceil(n / walk.chunk)
        size = math.ceil(n / parts)

        def cut(x):
            pad = [(0, parts * size - n)] + [(0, 0)] * (x.ndim - 1)
            return jnp.pad(x, pad).reshape(parts, size, *x.shape[1:])

        def strip(to_rows, part):
            columns, to_columns = part
            more = tile(rows, columns)
            return jax.tree.map(join, to_rows, more[0]), jax.tree.map(join, to_columns, more[1])

        def around(carry, _):
            to_rows, columns, to_columns = carry
            to_rows, to_columns = jax.lax.scan(strip, to_rows, (columns, to_columns))
            if ways > 1:
                columns, to_columns = jax.lax.ppermute((columns, to_columns), walk.axis, ring)
            return (to_rows, columns, to_columns), None

        carry = (start[0], jax.tree.map(cut, columns), jax.tree.map(cut, start[1]))
        (to_rows, _, to_columns), _ = jax.lax.scan(around, carry, length=ways)
        return to_rows, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], to_columns)

    if walk.mesh is None:
        return local(rows, columns, start)
    lies = P(walk.axis)
    # Nothing is differentiated through it: gradients are walks of their own.
    cut = jax.shard_map(local, mesh=walk.mesh, in_specs=lies, out_specs=lies, check_vma=False)
    return cut(rows, columns, start)
