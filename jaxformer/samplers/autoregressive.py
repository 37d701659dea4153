"""Text one token after the other, by a model's step and a cache: one program in all."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxformer.errors import InputError
from jaxformer.samplers.logits import PLAIN, Law

Stops = tuple[tuple[int, ...], ...]  # Each a few tokens after which a text ends.


@runtime_checkable
class Step(Protocol):
    """A model's step; `layers.cache.Stepper` makes one of a module."""

    def __call__(
        self,
        cache: Any,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        fresh: bool = False,
        read: Int[Array, "B R"] | None = None,
    ) -> tuple[Float[Array, "B R V"], Any]:
        """Logits after tokens at `positions`, and the cache with those tokens in it.

        Position -1 is no token. With `fresh` the cache holds nothing yet. `read` are the
        columns whose logits are asked for, all of them if not given.
        """
        ...


class Generated(NamedTuple):
    """What was drawn after each prompt."""

    tokens: Int[Array, "B steps"]  # `pad` from `lengths` on.
    lengths: Int[Array, " B"]  # how many were drawn, those of the stop sequence among them.
    ended: Bool[Array, " B"]  # by a stop sequence, and not for want of steps.


def sample(
    step: Step,
    cache: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Array,
    *,
    steps: int,
    room: int | None,
    law: Law = PLAIN,
    stop: Stops = (),
    pad: int = 0,
) -> Generated:
    """Draws up to `steps` tokens after each prompt; stops when every row has ended.

    It is to be jitted, with `steps, room, law, stop, pad` static: the prompts go through the
    model at once, then one token of each row at a time, in a `lax.while_loop`.

    Args:
      step: of the model, see `Step`.
      cache: without a token, for `B` rows.
      tokens: prompts, of any content behind their `lengths`.
      lengths: of the prompts, at least 1.
      key: one for all, or one for each row `[B]`. Row `b` draws its token `i` by
        `fold_in(keys[b], i)`, so that a row's text does not depend on the rows beside it.
      steps: the most tokens that are drawn for a row.
      room: how many tokens of a row the cache has room for (`layers.cache.slots`), None
        where there is no end to it.
      law: what tokens are drawn from.
      stop: sequences of tokens; a row ends where it has drawn one of them.
      pad: what stands behind a row's end.

    Raises:
      InputError: prompts that are empty, or with `steps` longer than the cache.
    """
    B, T = tokens.shape
    fits(tokens, lengths, steps, room)
    keys = by_row(key, B)
    at = jnp.where(jnp.arange(T)[None] < lengths[:, None], jnp.arange(T)[None], -1)
    logits, cache = step(cache, tokens, at, fresh=True, read=lengths[:, None] - 1)

    class State(NamedTuple):
        number: Int[Array, ""]  # of the token that comes next.
        cache: Any
        text: Text
        logits: Float[Array, "B V"]  # its logits.

    def more(state: State):
        return (state.number < steps) & ~state.text.done.all()

    def draw(state: State) -> tuple[Text, Int[Array, " B"]]:
        drawn = law.draw(fold(keys, state.number), state.logits, state.text.seen)
        return state.text.add(drawn[:, None], jnp.ones_like(drawn), stop), drawn

    def body(state: State) -> State:
        text, drawn = draw(state)
        at = jnp.where(text.done, -1, lengths + state.number)
        logits, cache = step(state.cache, drawn[:, None], at[:, None])
        return State(state.number + 1, cache, text, logits[:, 0])

    first = Text.begin(tokens, lengths, steps, pad, logits.shape[-1], law, stop)
    state = State(jnp.asarray(0), cache, first, logits[:, 0])
    # The last token is drawn after the loop: nothing asks for the logits behind it.
    last = jax.lax.while_loop(lambda s: more(s) & (s.number < steps - 1), body, state)
    text = jax.lax.cond(more(last), lambda s: draw(s)[0], lambda s: s.text, last)
    return text.generated()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Text:
    """What has been drawn so far, row by row, and whether it has ended."""

    tokens: Int[Array, "B steps"]
    lengths: Int[Array, " B"]
    done: Bool[Array, " B"]
    ended: Bool[Array, " B"]
    tail: Int[Array, "B m"]  # the last ones drawn, -1 before the first: for stops.
    seen: Bool[Array, "B V"] | None  # tokens of prompt and text, where a law asks.

    @classmethod
    def begin(cls, tokens, lengths, steps: int, pad: int, vocab: int, law: Law, stop: Stops):
        """Nothing drawn yet after the prompts `[B, T]`."""
        B = len(tokens)
        no = jnp.zeros(B, bool)
        seen = None
        if law.looks_back:
            real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
            seen = mark(jnp.zeros((B, vocab), bool), jnp.where(real, tokens, vocab))
        longest = max(map(len, stop), default=1)
        empty = jnp.full((B, steps), pad, jnp.int32)
        tail = jnp.full((B, longest - 1), -1, jnp.int32)
        return cls(empty, jnp.zeros(B, jnp.int32), no, no, tail, seen)

    def add(self, new: Int[Array, "B n"], count: Int[Array, " B"], stop: Stops) -> Text:
        """With the first `count` of each row's new tokens, but none behind its end."""
        (B, n), steps = new.shape, self.tokens.shape[1]
        window = jnp.concatenate([self.tail, new.astype(jnp.int32)], 1)
        ends = jnp.zeros((B, n), bool)
        for one in stop:
            hit = jnp.ones((B, n), bool)
            for back, token in enumerate(reversed(one)):
                start = window.shape[1] - n - back
                hit &= window[:, start : start + n] == token
            ends |= hit
        index = jnp.arange(n)[None]
        until = jnp.where(ends.any(1), ends.argmax(1) + 1, n + 1)
        count = jnp.minimum(jnp.where(self.done, 0, count), steps - self.lengths)
        ended = until <= count
        count = jnp.minimum(count, until)
        taken = index < count[:, None]
        slot = jnp.where(taken, self.lengths[:, None] + index, steps)
        rows = jnp.arange(B)[:, None]
        m = self.tail.shape[1]
        tail = jnp.take_along_axis(window, count[:, None] + jnp.arange(m)[None], 1)
        seen = self.seen
        if seen is not None:
            seen = mark(seen, jnp.where(taken, new, seen.shape[1]))
        lengths = self.lengths + count
        return Text(
            self.tokens.at[rows, slot].set(new.astype(jnp.int32), mode="drop"),
            lengths,
            self.done | ended | (lengths >= steps),
            self.ended | ended,
            tail,
            seen,
        )

    def generated(self) -> Generated:
        """The result."""
        return Generated(self.tokens, self.lengths, self.ended)


def mark(seen: Bool[Array, "B V"], tokens: Int[Array, "B n"]) -> Bool[Array, "B V"]:
    """With these tokens seen; one beyond the vocabulary is none."""
    rows = jnp.arange(len(tokens))[:, None]
    return seen.at[rows, tokens].set(True, mode="drop")


def by_row(key: Array, rows: int) -> Array:
    """A key for each row, of one for all or of as many."""
    return key if key.ndim else jax.random.split(key, rows)


def fold(keys: Array, number: Int[Array, "*B"]) -> Array:
    """Keys `[B]`, each folded with a number: the same, or each its own."""
    number = jnp.broadcast_to(number, keys.shape)
    return jax.vmap(jax.random.fold_in)(keys, number)


def fits(tokens, lengths, steps: int, room: int | None) -> None:
    """Raises InputError where prompts are empty, or too long with what comes after them."""
    longest = tokens.shape[1]
    if not isinstance(lengths, Tracer):
        known = np.asarray(lengths)
        longest = int(known.max())
        if known.min() < 1:
            raise InputError(
                "a prompt is empty; begin it with a token, such as that of a start"
            )
    if room is not None and longest + steps > room:
        raise InputError(
            f"a prompt of {longest} tokens and {steps} steps are more than the {room} slots of "
            "the cache; cut the prompt, take fewer steps, or make the cache longer"
        )
