"""How heads lie in a TPU's lanes, and what is done to them there.

A TPU register holds 128 lanes, and `[B, T, N * H]` is the layout that a product of matrices
writes and reads without a copy. The kernels cut it into *windows*: one head, or as many
heads as 128 lanes hold where they fit evenly. Other heads than the one at work are set to
zero, so a product over a whole window is the product over one head, and costs the same.

Heads that no 128 lanes hold evenly, as those of 72, lie apart in windows of their own, or
*astride*: as they come, in fewer bytes, and a product takes all 128 lanes that a head
touches, which are up to twice as many.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.kernels.case import Case, Side

LANES = 128


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Where the heads of one grid step lie.

    `H` head size, `G` query heads for each key head, `K` key heads in the step. A window
    is `width` lanes wide and holds `heads` heads side by side; `astride`, one that is
    worked on, for what lies in VMEM has no windows then.
    """

    H: int
    G: int
    K: int
    width: int
    heads: int
    astride: bool = False

    @classmethod
    def of(cls, N: int, K: int, H: int, lanes: int) -> "Lanes":
        """As many key heads a step as cut the array evenly and fill about `lanes`."""
        unit = math.lcm(H, LANES) // H
        even = K % unit == 0
        step = unit if even else K
        while even and K % (2 * step) == 0 and 2 * step * H <= lanes:
            step *= 2
        heads = LANES // H if even and LANES % H == 0 else 1
        return cls(H, N // K, step, -(-heads * H // LANES) * LANES, heads)

    @property
    def N(self) -> int:
        """Query heads in the step."""
        return self.G * self.K

    @property
    def uneven(self) -> bool:
        """True where windows hold lanes without a head, and what comes has none."""
        return self.heads * self.H < self.width and self.K * self.H % LANES == 0

    @property
    def span(self) -> int:
        """Lanes that a product takes."""
        if not self.astride:
            return self.width
        first = [n * self.H // LANES for n in range(self.K)]
        last = [-(-(n + 1) * self.H // LANES) for n in range(self.K)]
        return LANES * max(b - a for a, b in zip(first, last, strict=True))

    def laid(self, rows: int) -> tuple[int, int, int]:
        """The shape in VMEM of `rows` of all keys: windows, or one that is all of them."""
        if self.astride:
            return 1, rows, self.K * self.H
        return self.K // self.heads, rows, self.width

    def first(self, head):
        """Where the lanes begin that a product with a key head takes, of heads astride."""
        tile = _div(head * self.H, LANES)
        last = (self.K * self.H - self.span) // LANES
        if isinstance(tile, int):
            return min(tile, last) * LANES
        return pl.multiple_of(jnp.minimum(tile, last) * LANES, LANES)

    def split(self, x, rows=slice(None)) -> Iterator[Array]:
        """`[rows, n * H]` -> n / heads windows `[rows, width]`, zero where there is no head.

        `x` is an array, or one `[1, T, n * H]` in VMEM, of which these rows are read window
        by window: by value, as a view of rows must end where a register does.
        """
        size, whole = self.heads * self.H, x.ndim == 2
        for start in range(0, x.shape[-1], size):
            at = (rows, slice(start, start + size))
            part = x[at] if whole else x[0, *at]
            if size < self.width:
                spare = jnp.zeros((part.shape[0], self.width - size), part.dtype)
                part = jnp.concatenate([part, spare], 1)
            yield part

    def store(self, ref, windows: Iterable[Array], rows) -> None:
        """Writes windows side by side into rows of `[1, T, n * H]`, one after the other."""
        size = self.heads * self.H
        for u, w in enumerate(windows):
            ref[0, rows, u * size : (u + 1) * size] = w[:, :size].astype(ref.dtype)

    def key_head(self, head):
        """The key head of a query head."""
        return _div(head, self.G)

    def window(self, head):
        """The window of a query head's keys."""
        return _div(self.key_head(head), self.heads)

    def only(self, x: Array, head: int) -> Array:
        """A window of queries with query head `head` alone, in its key head's lanes."""
        if self.astride:
            spare = jnp.zeros((x.shape[0], self.span - self.width), x.dtype)
            key = self.key_head(head)
            return pltpu.roll(jnp.concatenate([x, spare], 1), key * self.H - self.first(key), 1)
        if self.heads == 1:
            return x
        here, there = head % self.heads, head // self.G % self.heads
        if here != there:
            x = pltpu.roll(x, (there - here) % self.heads * self.H, 1)
        return jnp.where(self._slot(there), x, jnp.zeros_like(x))

    def _lane(self) -> Array:
        return lax.broadcasted_iota(jnp.int32, (1, self.width), 1)

    def _slot(self, slot: int) -> Array:
        lane = self._lane()
        return (lane >= slot * self.H) & (lane < (slot + 1) * self.H)

    def _each(self, x: Array) -> Array:
        """`[rows, width]` float32 -> the mean over each head, in all its lanes."""
        out = jnp.zeros_like(x)
        for slot in range(self.heads):
            one = self._slot(slot)
            mean = jnp.where(one, x, 0.0).sum(1, keepdims=True) * (1 / self.H)
            out = jnp.where(one, mean, out)
        return out

    def _swap(self, x: Array) -> Array:
        """Lane i of a head gets lane i + H/2, and the other way round."""
        lane, half = self._lane(), self.H // 2
        first = lane < half
        for slot in range(1, self.heads):
            start = slot * self.H
            first |= (lane >= start) & (lane < start + half)
        return jnp.where(first, pltpu.roll(x, self.width - half, 1), pltpu.roll(x, half, 1))

    def prepare(self, x: Array, side: dict[str, Array], case: Side) -> Array:
        """Norm and rotation of a window `[rows, width]`, in float32."""
        if case.scale is not None:
            x, _ = self._normal(x, case)
            x *= side["scale"]
            if case.shift is not None:
                x += side["shift"]
        if case.cos is not None:
            x = x * side["cos"] + self._swap(x) * side["sin"]
        return x

    def _normal(self, x: Array, case: Side) -> tuple[Array, Array]:
        """x with its scale removed, and one over that scale."""
        if case.centered:
            x -= self._each(x)
            if self.heads * self.H < self.width:
                x = jnp.where(self._lane() < self.heads * self.H, x, 0.0)
        rate = lax.rsqrt(self._each(jnp.square(x)) + case.epsilon)
        return x * rate, rate

    def unprepare(
        self, g: Array, x: Array, side: dict[str, Array], case: Side
    ) -> tuple[Array, Array, Array]:
        """Gradients by x, and by the norm's scale and shift summed over rows `[1, width]`."""
        none = jnp.zeros((1, self.width), jnp.float32)
        if case.cos is not None:
            g = g * side["cos"] + self._swap(g * side["sin"])
        if case.scale is None:
            return g, none, none
        normal, rate = self._normal(x, case)
        d_scale, d_shift = (y.sum(0, keepdims=True) for y in (g * normal, g))
        g *= side["scale"]
        inner = g - normal * self._each(g * normal)
        if case.centered:
            inner -= self._each(g)
        return inner * rate, d_scale, d_shift


def _div(a, b: int):
    """Of indices, which no one needs to round down: the kernels cannot."""
    return a // b if isinstance(a, int) else lax.div(a, b)


def sides(case: Case, lanes: Lanes) -> dict[str, dict[str, Array]]:
    """What `prepare` reads, by window: weights `[1, width]`, angles `[b, T, width]`."""
    return {"q": _side(case.q, lanes), "k": _side(case.k, lanes)}


def _side(side: Side, lanes: Lanes) -> dict[str, Array]:
    def wide(x):
        x = jnp.concatenate([x] * lanes.heads, -1)
        spare = lanes.width - x.shape[-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)]).astype(jnp.float32)

    found = {}
    for name in ("scale", "shift"):
        if (weight := getattr(side, name)) is not None:
            found[name] = wide(weight[None])
    if side.cos is not None:
        assert side.sin is not None
        found["cos"] = wide(jnp.concatenate([side.cos, side.cos], -1))
        found["sin"] = wide(jnp.concatenate([-side.sin, side.sin], -1))
    return found
