"""Several tokens for one look of a large model: a draft guesses them, the model judges.

What is drawn has the law of the model alone, whatever the draft. Sources: Leviathan et al.
2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.ops.draw import draw, uniform
from jaxformer.samplers.autoregressive import Step, Stops, Text, by_row, fits, fold, mark
from jaxformer.samplers.draft import Draft
from jaxformer.samplers.logits import PLAIN, Law


class Speculated(NamedTuple):
    """What was drawn, as `autoregressive.Generated`, and how it went."""

    tokens: Int[Array, "B steps"]
    lengths: Int[Array, " B"]
    ended: Bool[Array, " B"]
    rounds: Int[Array, " B"]  # looks of the model, each at `ahead` guesses.
    accepted: Int[Array, " B"]  # how many of all these guesses it took.


def acceptance(p: Float[Array, "*B V"], q: Float[Array, "*B V"], guess: Int[Array, "*B"]):
    """With what probability a guess drawn by `q` is taken, `min(1, p / q)` of it."""
    mine, theirs = (jnp.take_along_axis(x, guess[..., None], -1)[..., 0] for x in (p, q))
    return jnp.where(theirs > 0, jnp.minimum(1, mine / jnp.where(theirs > 0, theirs, 1)), 0)


def residual(p: Float[Array, "*B V"], q: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """What is drawn by in the place of a guess not taken: `max(p - q, 0)` to a sum of 1.

    Where that is nothing, `p` and `q` are the same but for rounding, and it is `p`.
    """
    rest = jnp.maximum(p - q, 0)
    total = rest.sum(-1, keepdims=True)
    return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1), p)


def sample(
    step: Step,
    cache: Any,
    draft: Draft,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Array,
    *,
    steps: int,
    room: int | None,
    law: Law = PLAIN,
    stop: Stops = (),
    pad: int = 0,
) -> Speculated:
    """Draws up to `steps` tokens after each prompt, by the law of the model alone.

    Each round the model sees the guesses at once and takes those of the beginning, each by
    `acceptance`, and draws one token more: by `residual` in the place of the first that is
    not taken, or after all of them. Greedy text is that of `autoregressive.sample`; drawn
    text has its law, by other random numbers. What the cache holds of guesses not taken is
    covered by position, and written over; rings need `draft.ahead` slots to spare.

    Arguments and errors are those of `autoregressive.sample`, and `draft`, see
    `samplers.draft`. To be jitted, and the draft made within.
    """
    (B, T), k = tokens.shape, draft.ahead
    fits(tokens, lengths, steps, room)
    keys = by_row(key, B)
    index = jnp.arange(T)[None]
    at = jnp.where(index < lengths[:, None], index, -1)
    logits, cache = step(cache, tokens, at, fresh=True, read=lengths[:, None] - 1)
    V = logits.shape[-1]
    row = jnp.arange(B)[:, None]

    class State(NamedTuple):
        number: Int[Array, ""]  # of the round.
        cache: Any
        draft: Any
        whole: Int[Array, "B L"]  # prompts and what was drawn.
        text: Text
        rounds: Int[Array, " B"]
        accepted: Int[Array, " B"]

    def body(state: State) -> State:
        text, n = state.text, lengths + state.text.lengths
        guess_keys, judge_keys, draw_keys = jax.vmap(
            lambda key: jax.random.split(key, 3), out_axes=1
        )(fold(keys, state.number))
        guesses, found, drafted = draft.propose(state.draft, state.whole, n, guess_keys)
        last = jnp.take_along_axis(state.whole, n[:, None] - 1, 1)
        at = n[:, None] - 1 + jnp.arange(k + 1)[None]
        at = jnp.where(text.done[:, None], -1, at)
        seen_tokens = jnp.concatenate([last, guesses], 1)
        logits, cache = step(state.cache, seen_tokens, at)
        p = jax.nn.softmax(law.logits(logits, _seen(text.seen, guesses)))
        q = jax.nn.one_hot(guesses, V) if found is None else jax.nn.softmax(found)

        luck = jax.vmap(lambda key: uniform(key, (k,)))(judge_keys)
        taken = luck < acceptance(p[:, :k], q, guesses)
        count = jnp.cumprod(taken, 1).sum(1)
        # Where all are taken there is no guess to make up for.
        q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
        mine, theirs = (x[jnp.arange(B), count] for x in (p, q))
        token = jax.vmap(draw)(draw_keys, jnp.log(residual(mine, theirs)))

        ahead = jnp.arange(k + 1)[None]
        new = jnp.where(
            ahead < count[:, None], jnp.pad(guesses, ((0, 0), (0, 1))), token[:, None]
        )
        after = text.add(new, count + 1, stop)
        grown = after.lengths - text.lengths
        slot = jnp.where(ahead < grown[:, None], n[:, None] + ahead, T + steps)
        whole = state.whole.at[row, slot].set(new, mode="drop")
        rounds = state.rounds + ~text.done
        accepted = state.accepted + jnp.where(text.done, 0, count)
        return State(state.number + 1, cache, drafted, whole, after, rounds, accepted)

    zeros = jnp.zeros(B, jnp.int32)
    state = State(
        jnp.asarray(0),
        cache,
        draft.start(tokens, lengths),
        jnp.pad(tokens.astype(jnp.int32), ((0, 0), (0, steps))),
        Text.begin(tokens, lengths, steps, pad, V, law, stop),
        zeros,
        zeros,
    )
    last = jax.lax.while_loop(lambda s: ~s.text.done.all(), body, state)
    return Speculated(*last.text.generated(), last.rounds, last.accepted)


def _seen(seen, guesses) -> Bool[Array, "B k V"] | None:
    """Which tokens stand before each place: in the text, or among the guesses before it."""
    if seen is None:
        return None
    k = guesses.shape[1]
    before = [seen]
    for i in range(k):
        before.append(mark(before[-1], guesses[:, i : i + 1]))
    return jnp.stack(before, 1)
