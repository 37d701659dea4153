"""Unmasking block by block with a cache: what is not at work is not looked at anew.

`growing` is for models that see blocks as they come (BD3-LM, arXiv 2503.09573): what is
kept of a filled block never changes, and the text is that of `unmask.sample` (but of experts
with a capacity, who take other tokens where there are fewer). `refreshed` is
for models that see both ways: all is computed at a block's start and after every `refresh`
steps, and between them only a part, which looks at what was kept of the rest (Fast-dLLM,
2505.22618). That is exact in the steps in which all is computed.

Both are one program of static shapes, and a row is drawn as it is alone, whatever stands
beside it. The model is a `Canvas`, which `models.mdlm.Canvas` makes of one; models that are
told the time are not.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.errors import InputError
from jaxformer.samplers.autoregressive import by_row
from jaxformer.samplers.logits import PLAIN, Law
from jaxformer.samplers.unmask import Filled, Show, begins, check, closed, revealer

CHUNKS = 8  # A prompt as long as the canvas is computed in so many calls.


@runtime_checkable
class Canvas(Protocol):
    """A model that fills canvases, with a cache. `read` are the places asked for."""

    def empty(self, rows: int, length: int) -> Any:
        """A cache without a token in it."""
        ...

    def whole(
        self, tokens: Int[Array, "B T"], read: Int[Array, "B R"]
    ) -> tuple[Float[Array, "B R V"], Any]:
        """Logits, and a cache of all tokens."""
        ...

    def part(
        self,
        cache: Any,
        tokens: Int[Array, "B T"],
        first: Int[Array, " B"],
        size: int,
        read: Int[Array, "B R"],
    ) -> tuple[Float[Array, "B R V"], Any]:
        """The same from `size` tokens from `first` on, and from what is kept of the rest.

        What lies beyond the canvas is no token. The cache given back holds the new ones.
        """
        ...


def growing(
    canvas: Canvas,
    tokens: Int[Array, "B T"],
    key: Array,
    *,
    mask_id: int,
    show: Show,
    block: int,
    law: Law = PLAIN,
    end: int | None = None,
) -> Filled:
    """Fills blocks one after the other, each row at its own; args as of `unmask.sample`.

    What is kept is written where a row begins a block, by a call that computes the block
    before it too, now that it is filled; calls within a block only read. Blocks given before
    the first mask are computed a few at once, later ones in a call each.
    """
    check(tokens, mask_id, block, law)
    own = getattr(canvas, "block", block)
    if own != block:
        raise InputError(
            f"block={block}, and the canvas has block={own}; give it the model's own, "
            f"canvas.replace(block={block})"
        )
    B, T = tokens.shape
    keys = by_row(key, B)
    reveal = revealer(show, law, mask_id, T)
    of, since = jnp.arange(T) // block, begins(tokens, mask_id)

    def places(now):
        return now[:, None] * block + jnp.arange(block)[None]

    def at_work(tokens, now):
        """Which rows have something to fill in their block."""
        return (taken(tokens, places(now), -1) == mask_id).any(1)

    def advance(state, now, logits):
        (tokens, shown), number, (steps, calls) = state
        at = places(now)
        mine = taken(tokens, at, -1)
        opened = mine == mask_id
        new = reveal(keys, steps, number, at, logits, mine, opened)
        found = _shown(tokens, shown, at, new, steps, mask_id, end, since)
        some = opened.any(1)
        return found, number + some, (steps + some, calls + 1)

    def body(carry):
        state, now, cache = carry
        before, at = (now - 1) * block, places(now)
        logits, cache = canvas.part(cache, state[0][0], before, 2 * block, at)
        state = advance(state, now, logits)

        def within(state):
            """Whether each row that has masks has one in its block, and one does."""
            masked = (state[0][0] == mask_id).any(1)
            return masked.any() & (at_work(state[0][0], now) | ~masked).all()

        def step(state):
            logits, _ = canvas.part(cache, state[0][0], now * block, block, at)
            return advance(state, now, logits)

        found, number, counts = jax.lax.while_loop(within, step, state)
        some = at_work(found[0], now)
        return (found, jnp.where(some, number, 0), counts), now + ~some, cache

    first = jnp.where(tokens == mask_id, of[None], T // block).min(1)
    given = jnp.where(first < T // block, first - 1, 0).max() * block
    chunk = -(-T // block // CHUNKS) * block
    none = jnp.zeros((B, 0), jnp.int32)

    def keep(carry):
        cache, start, calls = carry
        cache = canvas.part(cache, tokens, jnp.full(B, start), chunk, none)[1]
        return cache, start + chunk, calls + 1

    cache, _, calls = jax.lax.while_loop(
        lambda carry: carry[1] < given, keep, (canvas.empty(B, T), jnp.int32(0), jnp.int32(0))
    )
    zeros = jnp.zeros(B, jnp.int32)
    state = ((tokens, jnp.full((B, T), -1, jnp.int32)), zeros, (zeros, calls))
    (found, _, (_, calls)), *_ = jax.lax.while_loop(
        lambda carry: (carry[0][0][0] == mask_id).any(), body, (state, first, cache)
    )
    return Filled(*found, calls)


def refreshed(
    canvas: Canvas,
    tokens: Int[Array, "B T"],
    key: Array,
    *,
    mask_id: int,
    show: Show,
    block: int,
    keep: Literal["before", "around"] = "around",
    refresh: int | None = None,
    law: Law = PLAIN,
    end: int | None = None,
) -> Filled:
    """Fills blocks one after the other, all rows the same one; args as of `unmask.sample`.

    Args:
      canvas: the model.
      tokens: what is given, and `mask_id` where it is to be filled.
      key: one for all, or one for each row `[B]`.
      mask_id: the token that says "masked".
      show: which are shown in a step.
      block: tokens in a block; it divides T.
      keep: what is kept between refreshes: "before" the block, so that it and all after it
        are computed (Fast-dLLM's prefix cache); or "around" it, so that it alone is (its
        dual cache).
      refresh: steps from one in which all is computed to the next; if not given, it is only
        the first of each block. 1 is the same as no cache.
      law: what is made of the logits before one draws.
      end: if given, masks that follow an `end` become `end`, as of `unmask.sample`.

    Raises:
      InputError: as `unmask.sample`; a `refresh` below 1; another `keep`; a canvas of a model
        of block diffusion.
    """
    check(tokens, mask_id, block, law)
    B, T = tokens.shape
    if keep not in ("before", "around"):
        raise InputError(f"keep={keep!r} must be before or around")
    own = getattr(canvas, "block", None)
    if own is not None:
        raise InputError(
            f"the canvas has block={own}, and refreshed is for models that see both "
            "ways; draw from it by growing"
        )
    if refresh is not None and refresh < 1:
        raise InputError(f"refresh={refresh} must be 1 step or more")
    keys = by_row(key, B)
    reveal = revealer(show, law, mask_id, T)
    of, since = jnp.arange(T) // block, begins(tokens, mask_id)

    def at_work(tokens):
        return jnp.where(tokens == mask_id, of[None], T // block).min()

    def advance(state, now, logits):
        """One step of every row that has something to fill in the block."""
        (tokens, shown), number, (steps, calls) = state
        at = jnp.broadcast_to(now * block + jnp.arange(block), (B, block))
        mine = taken(tokens, at, -1)
        opened = mine == mask_id
        new = reveal(keys, steps, jnp.full(B, number), at, logits, mine, opened)
        found = _shown(tokens, shown, at, new, steps, mask_id, end, since)
        return found, number + 1, (steps + opened.any(1), calls + 1)

    def between(now, cache):
        """A step that computes a part."""
        at = jnp.broadcast_to(now * block + jnp.arange(block), (B, block))
        first = jnp.full(B, now * block)

        def part(size: int) -> Callable[[Any], Array]:
            return lambda tokens: canvas.part(cache, tokens, first, size, at)[0]

        sizes = [block] if keep == "around" else _sizes(T, block)

        def step(state):
            left = block if keep == "around" else T - now * block
            return advance(state, now, _by_size(sizes, left, part, state[0][0]))

        return step

    def body(carry):
        state, block_of = carry
        tokens = state[0][0]
        now = at_work(tokens)
        state = (state[0], jnp.where(now == block_of, state[1], 0), state[2])
        at = jnp.broadcast_to(now * block + jnp.arange(block), (B, block))
        logits, cache = canvas.whole(tokens, at)
        begun = state[1]
        state = advance(state, now, logits)

        def go_on(state):
            more = at_work(state[0][0]) == now
            return more if refresh is None else more & (state[1] - begun < refresh)

        if refresh != 1:
            state = jax.lax.while_loop(go_on, between(now, cache), state)
        return state, now

    zeros = jnp.zeros(B, jnp.int32)
    state = ((tokens, jnp.full((B, T), -1, jnp.int32)), jnp.int32(0), (zeros, jnp.int32(0)))
    start = (state, jnp.int32(-1))
    (found, _, (_, calls)), _ = jax.lax.while_loop(
        lambda carry: (carry[0][0][0] == mask_id).any(), body, start
    )
    return Filled(*found, calls)


def taken(x: Int[Array, "B T"], at: Int[Array, "B R"], beyond: int) -> Int[Array, "B R"]:
    """Of each row what stands at these places, or `beyond` it."""
    T = x.shape[1]
    found = jnp.take_along_axis(x, at.clip(0, T - 1), 1)
    return jnp.where((at >= 0) & (at < T), found, beyond)


def _shown(tokens, shown, at, new, steps, mask_id: int, end: int | None, since):
    """The canvas with `new` tokens at these places, and when each of all was shown."""
    row = jnp.arange(len(at))[:, None]
    found = tokens.at[row, at].set(new, mode="drop")
    if end is not None:  # Of rows that take a step: the others are as they would be alone.
        some = (tokens[row, at] == mask_id).any(1, keepdims=True)
        found = jnp.where(some, closed(found, end, mask_id, since), found)
    changed: Bool[Array, "B T"] = (found != tokens) & (tokens == mask_id)
    return found, jnp.where(changed, steps[:, None], shown)


def _sizes(length: int, block: int) -> list[int]:
    """Lengths of which one is a program of its own: halves of all, in whole blocks."""
    sizes, blocks = [length], length // block
    while blocks > 1:
        blocks = -(-blocks // 2)
        sizes.append(blocks * block)
    return sizes[::-1]


def _by_size(sizes: list[int], least, make: Callable[[int], Callable], x):
    """`make(size)(x)` for the first of the rising `sizes` that is not below `least`."""
    if len(sizes) == 1:
        return make(sizes[0])(x)
    which = (jnp.asarray(sizes) < least).sum()
    return jax.lax.switch(which, [make(size) for size in sizes], x)
