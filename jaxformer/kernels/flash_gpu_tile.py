"""Tiles of attention inside of a Triton kernel: read, prepare, score, write.

A head is held as a list of parts, `[rows, width]` each, because Triton's arrays have
widths that are powers of two: head size 72 is 64 + 16 columns, 8 of them zeros, and not
128. With rotary the parts of both halves of a head correspond, so that turning a pair
needs no exchange between columns. Nothing is padded in memory: what a tile has outside of
its array is neither read nor written, and is zero.

Places carry the orientation: with queries `[T, 1]` and keys `[1, S]` a tile of logits is
`[T, S]`, and with queries `[1, T]` and keys `[S, 1]` its transpose.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton

from jaxformer.kernels.arithmetic import LOG2E, multiply
from jaxformer.kernels.case import Case, Side

Parts = list[Array]  # A tile of a head, cut by columns.


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of an attention problem, and how its heads are cut.

    `rotary`: heads are turned, and cut by halves. `laden`: tiles hold more than heads.
    """

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    rotary: bool
    laden: bool
    dtype: jnp.dtype

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, case: Case) -> "Problem":
        """Reads the sizes off the arrays; refuses what the kernels cannot do."""
        (B, T, N, H), (_, S, K, _) = q.shape, k.shape
        if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            raise NotImplementedError(f"the Triton kernel has no products of {q.dtype}")
        if not q.dtype == k.dtype == v.dtype:
            dtypes = f"{q.dtype}, {k.dtype}, {v.dtype}"
            raise NotImplementedError(f"the Triton kernel needs one dtype, got {dtypes}")
        if H > 256:
            raise NotImplementedError(f"head size {H} is above the Triton kernel's 256")
        rotary = case.q.cos is not None or case.k.cos is not None
        laden = not (case.q.plain and case.k.plain and case.bias is None)
        return cls(B, T, S, N, K, H, rotary, laden, q.dtype)

    @property
    def G(self) -> int:
        """Query heads that share a key head."""
        return self.N // self.K

    @property
    def cut(self) -> list[tuple[int, int]]:
        """The first column and the size of each part."""
        half = self.H // 2
        return split(0, half) + split(half, half) if self.rotary else split(0, self.H)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SideRefs(Side):
    """A `Side` of references to arrays."""

    scale: Any = None
    shift: Any = None
    cos: Any = None
    sin: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CaseRefs(Case):
    """A `Case` of references to arrays: what a kernel is given."""

    intervals: Any = None
    bias: Any = None
    slopes: Any = None

    @classmethod
    def of(cls, case: Case) -> "CaseRefs":
        """The same, in the class that may hold references."""
        q, k = (SideRefs(**vars(side)) for side in (case.q, case.k))
        fields: dict[str, Any] = vars(case) | {"q": q, "k": k}
        return cls(**fields)


def width(size: int) -> int:
    """How wide `size` columns are held: a power of two, and tensor cores take 16 or more."""
    return max(16, 1 << (size - 1).bit_length())


def split(first: int, size: int) -> list[tuple[int, int]]:
    """Cuts columns into parts, where these hold less together than one would."""
    low = width(size) // 2
    if low < size:
        rest = split(first + low, size - low)
        if low + sum(width(size) for _, size in rest) < width(size):
            return [(first, low), *rest]
    return [(first, size)]


class Places(NamedTuple):
    """Where a tile lies along one axis of an array, and which of it is inside (None: all)."""

    at: Array
    inside: Array | None


def places(tile, size: int, length: int, axis: int) -> Places:
    """Of the tile number `tile`, of `size` places, in an axis of `length`."""
    at = jnp.expand_dims(tile * size + lax.iota(jnp.int32, size), 1 - axis)
    return Places(at, None if length % size == 0 else at < length)


def part(first: int, size: int) -> Places:
    """The columns of a part."""
    at = first + lax.iota(jnp.int32, width(size))[None, :]
    return Places(at, None if width(size) == size else at < first + size)


def load(ref, *index, other: int | float = 0) -> Array:
    """The tile of `ref` at numbers and `Places`; `other` where that is outside."""
    at, mask = _address(index)
    return triton.load(ref.at[at], mask=mask, other=None if mask is None else other)


def store(ref, *index, value: Array):
    """Writes what `load` would read, in the dtype of `ref`."""
    at, mask = _address(index)
    triton.store(ref.at[at], value.astype(ref.dtype), mask=mask)


def load_head(p: Problem, ref, b, rows: Places, n) -> Parts:
    """A tile of head `n` of `[B, T, N, H]`."""
    return [load(ref, b, rows, n, part(*c)) for c in p.cut]


def store_head(p: Problem, ref, b, rows: Places, n, values: Parts):
    """Writes what `load_head` would read."""
    for c, value in zip(p.cut, values, strict=True):
        store(ref, b, rows, n, part(*c), value=value)


def shared(ref, axis: int, index):
    """`index`, or 0 where the array has one entry for all."""
    return 0 if ref.shape[axis] == 1 else index


def product(a: Parts, b: Parts) -> Array:
    """`a [M, H]` times the transpose of `b [N, H]`."""
    pairs = zip(a, b, strict=True)
    return functools.reduce(operator.add, [multiply(x, y, contract=1) for x, y in pairs])


def logits(y: Array, case: Case, b, n, t: Places, s: Places) -> tuple[Array, Array | None]:
    """From products to logits, in base 2, and the cap's own slope.

    Base 2, because the hardware has an exponential of 2; `LOG2E` joins the scale.
    """
    slope = None
    if case.softcap is None:
        y = y * (case.scale * LOG2E)
    else:
        y = jnp.tanh(y * (case.scale / case.softcap))
        slope = 1 - y * y
        y = y * (case.softcap * LOG2E)
    if case.bias is not None:
        bias = load(case.bias, shared(case.bias, 0, b), shared(case.bias, 1, n), t, s)
        y += bias.astype(jnp.float32) * LOG2E
    if case.slopes is not None:
        distance = jnp.abs(t.at + case.offset - s.at).astype(jnp.float32)
        y -= (case.slopes[n] * LOG2E) * distance
    return y, slope


def bounds(case: Case, b, t: Places) -> list[Array]:
    """The ends of the queries' intervals; none where all keys are seen."""
    if case.intervals is None:
        return []
    b = shared(case.intervals, 0, b)
    return [load(case.intervals, b, i, t) for i in range(case.intervals.shape[1])]


def visible(ends: list[Array], s: Places, S: int) -> Array:
    """Where a query sees a key."""
    if not ends:
        return s.at < S
    pairs = zip(ends[::2], ends[1::2], strict=True)
    return functools.reduce(operator.or_, [(a <= s.at) & (s.at < z) for a, z in pairs])


def prepare(p: Problem, x: Parts, side: Side, b, rows: Places) -> Parts:
    """Normalises and rotates rows in float32; gives them back in their dtype."""
    if side.plain:
        return x
    x = [a.astype(jnp.float32) for a in x]
    if side.scale is not None:
        x, _ = _standard(p, x, side)
        x = [a * w for a, w in zip(x, _weights(p, side.scale), strict=True)]
        if side.shift is not None:
            x = [a + w for a, w in zip(x, _weights(p, side.shift), strict=True)]
    if side.cos is not None:
        x = _turn(x, *_angles(p, side, b, rows))
    return [a.astype(p.dtype) for a in x]


def pull_back(p: Problem, d: Parts, x: Parts, side: Side, b, rows: Places):
    """The gradients of rows from that of `prepare(x)`; and the norm's, by name."""
    if side.cos is not None:
        cos, sin = _angles(p, side, b, rows)
        d = _turn(d, cos, [-a for a in sin])
    if side.scale is None:
        return d, {}
    x, inverse = _standard(p, [a.astype(jnp.float32) for a in x], side)
    sums = {"shift": [a.sum(0, keepdims=True) for a in d]}
    sums["scale"] = [(a * y).sum(0, keepdims=True) for a, y in zip(d, x, strict=True)]
    d = [a * w for a, w in zip(d, _weights(p, side.scale), strict=True)]
    along = _mean(p, [a * y for a, y in zip(d, x, strict=True)])
    level = _mean(p, d) if side.centered else 0.0
    d = [inverse * (a - y * along - level) for a, y in zip(d, x, strict=True)]
    return d, sums


def _address(index) -> tuple[tuple, Array | None]:
    """The index arrays, and the mask in the shape that they span."""
    at = tuple(i.at if isinstance(i, Places) else i for i in index)
    masks = [i.inside for i in index if isinstance(i, Places) and i.inside is not None]
    if not masks:
        return at, None
    shape = jnp.broadcast_shapes(*[i.at.shape for i in index if isinstance(i, Places)])
    mask = functools.reduce(operator.and_, masks)
    return at, jnp.broadcast_to(mask, shape)


def _standard(p: Problem, x: Parts, side: Side) -> tuple[Parts, Array]:
    """Rows of mean square 1, and with `centered` of mean 0; and their inverse size."""
    if side.centered:
        mean = _mean(p, x)
        x = [
            jnp.where(part(*c).at < c[0] + c[1], a - mean, 0)
            for c, a in zip(p.cut, x, strict=True)
        ]
    inverse = lax.rsqrt(_mean(p, [a * a for a in x]) + side.epsilon)
    return [a * inverse for a in x], inverse


def _mean(p: Problem, x: Parts) -> Array:
    """Of each row: `[rows, 1]`."""
    return functools.reduce(operator.add, [a.sum(1) for a in x])[:, None] / p.H


def _weights(p: Problem, ref) -> Parts:
    """A norm's weights `[H]`."""
    return [load(ref, part(*c)) for c in p.cut]


def _angles(p: Problem, side: Side, b, rows: Places) -> tuple[Parts, Parts]:
    """Cosines and sines, a part for every pair of parts."""
    b, cut = shared(side.cos, 0, b), p.cut[: len(p.cut) // 2]
    cos, sin = ([load(ref, b, rows, part(*c)) for c in cut] for ref in (side.cos, side.sin))
    return cos, sin


def _turn(x: Parts, cos: Parts, sin: Parts) -> Parts:
    """Rotates the pairs (of the first half, of the second half)."""
    a, b = x[: len(cos)], x[len(cos) :]
    first = [a * c - b * s for a, b, c, s in zip(a, b, cos, sin, strict=True)]
    return first + [b * c + a * s for a, b, c, s in zip(a, b, cos, sin, strict=True)]
