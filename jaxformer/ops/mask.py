"""Attention masks as data: small frozen pytrees, made dense only where one asks.

A mask says which keys a query may see. `Causal() & Segments(ids)` packs documents in a
row; `Causal() | Prefix(length)` is a prefix language model; `Causal() | Spans(a, b)` is
causal text around images that see themselves whole. Arrays inside a mask are data: a new
length does not compile anew.

A mask has two faces: `visible`, which is what it means, and `intervals`, the same as at
most two ranges of keys for each query, which is what a kernel reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from jaxformer.ops import intervals as sets

Halves = tuple[Sequence[sets.Interval], Sequence[sets.Interval]]


class Mask(struct.PyTreeNode):
    """What every mask can do. `visible` is the specification of each."""

    def visible(
        self, q: Int[Array, " T"], k: Int[Array, " S"], lengths: tuple[int, int]
    ) -> Bool[Array, "#B t s"]:
        """True where the query of index `q` may see the key of index `k`.

        Args:
          q: indices of some queries.
          k: indices of some keys.
          lengths: how many queries and how many keys there are in all.
        """
        raise NotImplementedError(type(self).__name__)

    def dense(self, T: int, S: int) -> Bool[Array, "#B T S"]:
        """The whole mask for `T` queries and `S` keys, True where one may look."""
        self.check(T, S)
        return self.visible(jnp.arange(T), jnp.arange(S), (T, S))

    def intervals(self, T: int, S: int) -> Int[Array, "#B n T"] | None:
        """The keys each of `T` queries sees, as ranges; None where it sees all `S`.

        Query `t` of row `b` sees key `s` where `i[b, 0, t] <= s < i[b, 1, t]`, or the
        same with rows 2 and 3 where `n` is 4.

        Raises:
          NotImplementedError: some queries need more than two ranges.
        """
        self.check(T, S)
        found = self.ranges(jnp.arange(T, dtype=jnp.int32), S)
        if any(sets.is_all(one, S) for one in found):
            return None
        return sets.stack(found, T)

    def ranges(self, q: Int[Array, " T"], S: int) -> Sequence[sets.Interval]:
        """`intervals` before they are stacked; `q` is all queries in order."""
        if not self.doubled:
            raise NotImplementedError(f"{type(self).__name__} has no intervals")
        return [interval for half in self.halves(q, S) for interval in half]

    @property
    def pads(self) -> bool:
        """True where tokens may be padding: a query that sees nothing, an unseen key."""
        return False

    @property
    def doubled(self) -> bool:
        """True where a row is [noisy, clean] halves of one sequence, which has `halves`."""
        return False

    def halves(self, q: Int[Array, " T"], S: int) -> Halves:
        """The `ranges` of keys in either half of them, where a row is `doubled`."""
        raise NotImplementedError(f"{type(self).__name__} knows no halves")

    def check(self, T: int, S: int) -> None:
        """Raises ValueError when the mask was made for other lengths."""

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)


def _number(name: str, n: Any, rows: bool = False) -> None:
    """Raises ValueError where `n` is no whole number, or with `rows` no row of them."""
    if n is None or isinstance(n, int):
        return
    shape, dtype = jnp.shape(n), jnp.result_type(n)
    if len(shape) > rows or not jnp.issubdtype(dtype, jnp.integer):
        kind = "an integer, or one for each row [B]" if rows else "one integer for all rows"
        raise ValueError(f"{name} is {dtype} of shape {shape} and must be {kind}")


class Full(Mask):
    """Every query sees every key."""

    def visible(self, q, k, lengths):
        return jnp.ones((1, q.size, k.size), bool)

    def ranges(self, q, S):
        return [(0, S)]


class Causal(Mask):
    """Query `i` sees keys up to `i + offset`; `offset` is how many keys stand before."""

    offset: int | Int[Array, ""] = 0

    def visible(self, q, k, lengths):
        return (k[None, :] <= q[:, None] + sets.near(self.offset))[None]

    def ranges(self, q, S):
        return [(0, q + sets.near(self.offset) + 1)]

    def check(self, T, S):
        _number("Causal.offset", self.offset)


class Window(Mask):
    """Query `i` sees keys `i - left` to `i + right`; None is without bound."""

    left: int | None = struct.field(pytree_node=False, default=None)
    right: int | None = struct.field(pytree_node=False, default=None)
    offset: int | Int[Array, ""] = 0

    def visible(self, q, k, lengths):
        distance = k[None, :] - (q[:, None] + sets.near(self.offset))
        seen = jnp.ones(distance.shape, bool)
        if self.left is not None:
            seen &= distance >= -self.left
        if self.right is not None:
            seen &= distance <= self.right
        return seen[None]

    def ranges(self, q, S):
        q = q + sets.near(self.offset)
        start = 0 if self.left is None else q - sets.near(self.left)
        stop = S if self.right is None else q + sets.near(self.right) + 1
        return [(start, stop)]

    def check(self, T, S):
        _number("Window.offset", self.offset)


class Prefix(Mask):
    """Every query sees the first `length` keys: one number, or one for each row."""

    length: int | Int[Array, "*B"]

    def visible(self, q, k, lengths):
        length = jnp.reshape(jnp.asarray(sets.near(self.length)), (-1, 1, 1))
        seen = k[None, None, :] < length
        return jnp.broadcast_to(seen, (len(length), q.size, k.size))

    def ranges(self, q, S):
        length = jnp.reshape(jnp.asarray(sets.near(self.length), jnp.int32), (-1, 1))
        return [(0, jnp.broadcast_to(length, (len(length), q.size)))]

    def check(self, T, S):
        _number("Prefix.length", self.length, rows=True)

    @property
    def pads(self):
        return True


class Segments(Mask):
    """Tokens see their own segment. Id 0 is padding, which neither sees nor is seen.

    The tokens of a segment stand side by side; padding may stand anywhere. Ids that are
    at hand, and not traced, are checked for it. Shapes: `q_ids` `[B, T]`, `k_ids`
    `[B, S]`; without `k_ids` keys are the queries.
    """

    q_ids: Int[Array, "B T"]
    k_ids: Int[Array, "B S"] | None = None

    def visible(self, q, k, lengths):
        k_ids = self.q_ids if self.k_ids is None else self.k_ids
        a, b = self.q_ids[:, q, None], k_ids[:, None, k]
        return (a == b) & (a != 0)

    def ranges(self, q, S):
        if self.k_ids is None:
            start, stop = sets.runs(self.q_ids)
        else:
            start, stop = sets.lookup(self.q_ids, self.k_ids)
        return [(start, jnp.where(self.q_ids == 0, start, stop))]

    @property
    def pads(self):
        return True

    def check(self, T, S):
        k_ids = self.q_ids if self.k_ids is None else self.k_ids
        for name, ids, length in (("q_ids", self.q_ids, T), ("k_ids", k_ids, S)):
            if ids.ndim != 2 or ids.shape[1] != length:
                raise ValueError(
                    f"Segments.{name} has shape {ids.shape} and must be [B, {length}], an id "
                    "for each token"
                )
            if not isinstance(ids, Tracer) and not sets.side_by_side(np.asarray(ids)):
                raise ValueError(
                    f"Segments.{name} {ids.shape} has an id in two places; the tokens of a "
                    "segment must stand side by side"
                )


class Spans(Mask):
    """Tokens of one span see each other both ways; those in none see nothing by it.

    Span `n` of row `b` holds positions `start[b, n]` to `stop[b, n] - 1`; an unused span
    has `stop <= start`. Shapes: `[B, n]` both.
    """

    start: Int[Array, "B n"]
    stop: Int[Array, "B n"]

    def check(self, T, S):
        shapes = jnp.shape(self.start), jnp.shape(self.stop)
        if len(shapes[0]) != 2 or shapes[0] != shapes[1] or not shapes[0][1]:
            raise ValueError(
                f"Spans.start {shapes[0]} and Spans.stop {shapes[1]} must both be [B, n], of "
                "one span or more; an unused one has stop <= start"
            )

    def visible(self, q, k, lengths):
        def inside(position):
            position = position[None, None, :]
            start, stop = self.start[..., None], self.stop[..., None]
            return (position >= start) & (position < stop)

        both = inside(q)[:, :, :, None] & inside(k)[:, :, None, :]
        return both.any(axis=1)

    def ranges(self, q, S):
        start, stop = (jnp.asarray(x, jnp.int32)[..., None] for x in (self.start, self.stop))
        inside = (q[None, None] >= start) & (q[None, None] < stop)
        # All spans that hold a query hold that point: together they are one range.
        first = jnp.where(inside, start, jnp.iinfo(jnp.int32).max).min(1)
        return [(first, jnp.where(inside, stop, 0).max(1))]

    @property
    def pads(self):
        return True


class BlockDiffusion(Mask):
    """The two-stream mask of block diffusion: [noisy, clean] halves of one sequence.

    A noisy token sees its own noisy block and the clean blocks before it; a clean token
    sees the clean blocks up to its own. Source: Arriola et al. 2025, arXiv 2503.09573.
    """

    size: int = struct.field(pytree_node=False)

    def visible(self, q, k, lengths):
        half = lengths[0] // 2
        q_clean, k_clean = (q >= half)[:, None], (k >= half)[None, :]
        q_block = (q % half // self.size)[:, None]
        k_block = (k % half // self.size)[None, :]
        noisy_noisy = ~q_clean & ~k_clean & (q_block == k_block)
        noisy_clean = ~q_clean & k_clean & (k_block < q_block)
        clean_clean = q_clean & k_clean & (k_block <= q_block)
        return (noisy_noisy | noisy_clean | clean_clean)[None]

    @property
    def doubled(self):
        return True

    def halves(self, q, S):
        half = S // 2
        noisy, begin = q < half, q % half // self.size * self.size
        end = jnp.minimum(begin + self.size, half)
        own = (jnp.where(noisy, begin, 0), jnp.where(noisy, end, 0))
        return [own], [(half, half + jnp.where(noisy, begin, end))]

    def check(self, T, S):
        if T != S or T % 2:
            raise ValueError(
                f"BlockDiffusion takes as many queries as keys, an even number; got {T} and {S}"
            )


class Twice(Mask):
    """A mask of one sequence for [noisy, clean] halves of it: each half sees both so."""

    mask: Mask

    def visible(self, q, k, lengths):
        halves = (lengths[0] // 2, lengths[1] // 2)
        return self.mask.visible(q % halves[0], k % halves[1], halves)

    def ranges(self, q, S):
        return _at_most_two(super().ranges(q, S), self)

    @property
    def doubled(self):
        return True

    def halves(self, q, S):
        half, T = S // 2, q.size // 2

        def twice(bound):
            x = jnp.asarray(bound, jnp.int32).clip(0, half)  # Beyond it the other one begins.
            return jnp.concatenate([jnp.broadcast_to(x, (*x.shape[:-1], T))] * 2, -1)

        noisy = [(twice(a), twice(z)) for a, z in self.mask.ranges(q[:T], half)]
        return noisy, [(a + half, z + half) for a, z in noisy]

    def check(self, T, S):
        if T % 2 or S % 2:
            raise ValueError(f"Twice takes two halves of queries and keys; got {T} and {S}")
        self.mask.check(T // 2, S // 2)

    @property
    def pads(self):
        return self.mask.pads


class And(Mask):
    """What both masks show."""

    a: Mask
    b: Mask

    def visible(self, q, k, lengths):
        return self.a.visible(q, k, lengths) & self.b.visible(q, k, lengths)

    def ranges(self, q, S):
        if self.a.doubled and self.b.doubled:
            found = super().ranges(q, S)
        else:
            found = sets.both(self.a.ranges(q, S), self.b.ranges(q, S), S)
        return _at_most_two(found, self)

    @property
    def doubled(self):
        return self.a.doubled or self.b.doubled

    def halves(self, q, S):
        pairs = zip(self.a.halves(q, S), self.b.halves(q, S), strict=True)
        noisy, clean = (sets.both(a, b, S) for a, b in pairs)
        return noisy, clean

    @property
    def pads(self):
        return self.a.pads or self.b.pads

    def check(self, T, S):
        self.a.check(T, S)
        self.b.check(T, S)


class Or(Mask):
    """What either mask shows."""

    a: Mask
    b: Mask

    def visible(self, q, k, lengths):
        return self.a.visible(q, k, lengths) | self.b.visible(q, k, lengths)

    def ranges(self, q, S):
        return _at_most_two(sets.either(self.a.ranges(q, S), self.b.ranges(q, S), S), self)

    @property
    def pads(self):  # What one of them shows to all is no padding.
        return self.a.pads and self.b.pads

    def check(self, T, S):
        self.a.check(T, S)
        self.b.check(T, S)


def _at_most_two(
    found: Sequence[sets.Interval], mask: And | Or | Twice
) -> Sequence[sets.Interval]:
    if len(found) > sets.MOST:
        parts = (mask.mask,) if isinstance(mask, Twice) else (mask.a, mask.b)
        name = " and ".join(type(part).__name__ for part in parts)
        raise NotImplementedError(
            f"{type(mask).__name__} of {name} takes {len(found)} ranges of keys a query, and "
            f"a kernel at most {sets.MOST}"
        )
    return found


class Positions(Mask):
    """Causal by positions that are data, for keys in any order: what a cache holds.

    A query sees the keys of its own position and of those before it, not farther than
    `window - 1` where there is a window. With a `block` tokens see all of their own block of
    so many positions and the blocks before it; None is one block of all. A key of position
    -1 is none; neither sees a query of position -1 anything. What lies there must be finite,
    as the zeros of a cache are: it is not looked for (`pads`). Shapes: `q` `[#B, T]`, `k`
    `[#B, S]`.
    """

    q: Int[Array, "#B T"]
    k: Int[Array, "#B S"]
    window: int | None = struct.field(pytree_node=False, default=None)
    block: int | None = struct.field(pytree_node=False, default=1)

    def visible(self, q, k, lengths):
        mine, theirs = self.q[:, q, None], self.k[:, None, k]
        seen = (theirs >= 0) & (mine >= 0)
        if self.block == 1:
            seen &= theirs <= mine
        elif self.block is not None:
            seen &= theirs // self.block <= mine // self.block
        if self.window is not None:
            seen &= (theirs > mine - self.window) & (theirs < mine + self.window)
        return seen

    def check(self, T, S):
        for name, positions, length in (("q", self.q, T), ("k", self.k, S)):
            if positions.ndim != 2 or positions.shape[1] != length:
                raise ValueError(
                    f"Positions.{name} has shape {positions.shape} and must be [1 or B, "
                    f"{length}], one for each token"
                )
