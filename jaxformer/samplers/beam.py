"""The most probable texts, by a search that keeps some beginnings of each (beam search)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.samplers.autoregressive import Step, fits


class Found(NamedTuple):
    """Texts after each prompt, the best first."""

    tokens: Int[Array, "B n steps"]  # `pad` from `lengths` on.
    lengths: Int[Array, "B n"]  # the token that ends a text is one of it.
    scores: Float[Array, "B n"]  # -inf where there are fewer texts than beams.


def search(
    step: Step,
    cache: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    take: Callable[[Any, Int[Array, " n"]], Any],
    beams: int,
    steps: int,
    room: int | None,
    ends: tuple[int, ...] = (),
    alpha: float = 1.0,
    pad: int = 0,
) -> Found:
    """Searches for the texts of up to `steps` tokens with the greatest score.

    The score is the sum of the log probabilities, in nats, by `length ** alpha`; a text is
    done with a token of `ends`, or after `steps`. Beginnings that go on and texts that are
    done are kept apart, `beams` of each, so that neither displaces the other; the search
    stops where no beginning can become better than what is done. With as many beams as
    there are texts it is exact. To be jitted, with all but the first four static.

    Source: Wu et al. 2016, arXiv 1609.08144, with the length itself for their penalty.

    Args:
      step: of the model, see `autoregressive.Step`.
      cache: without a token, for `B` rows.
      tokens: prompts, of any content behind their `lengths`.
      lengths: of the prompts, at least 1.
      take: `layers.cache.take`: the cache of some rows.
      beams: how many texts are kept for each prompt.
      steps: the most tokens of a text.
      room: tokens that a row of the cache has room for; None is without end.
      ends: tokens that end a text.
      alpha: 0 favours short texts; the greater, the more it favours long ones.
      pad: what stands behind a text's end.

    Raises:
      InputError: prompts that are empty, or with `steps` longer than the cache.
    """
    (B, T), n = tokens.shape, beams
    fits(tokens, lengths, steps, room)
    at = jnp.where(jnp.arange(T)[None] < lengths[:, None], jnp.arange(T)[None], -1)
    logits, cache = step(cache, tokens, at, fresh=True, read=lengths[:, None] - 1)
    V = logits.shape[-1]
    is_end = jnp.zeros(V, bool).at[jnp.asarray(ends, jnp.int32)].set(True)
    starts = jnp.repeat(lengths, n)

    class State(NamedTuple):
        number: Int[Array, ""]  # of the token that comes next.
        cache: Any
        logits: Float[Array, "B n V"]
        live: Int[Array, "B n steps"]
        sums: Float[Array, "B n"]
        done: Found

    def more(state: State):
        longest = jnp.maximum((state.number + 1.0) ** alpha, float(steps) ** alpha)
        hope = state.sums.max(1) / longest
        return (state.number < steps) & (hope > state.done.scores.min(1)).any()

    def body(state: State) -> State:
        i = state.number
        sums = state.sums[..., None] + jax.nn.log_softmax(state.logits.astype(jnp.float32))
        score = sums / (i + 1.0) ** alpha
        last = is_end[None, None] | (i + 1 == steps)  # At the last step all texts are done.
        best, parent, token = top(jnp.where(last, score, -jnp.inf), n)
        texts = append(state.live, parent, token, i)
        done = keep(state.done, Found(texts, jnp.full((B, n), i + 1), best), n)
        sums, parent, token = top(jnp.where(last, -jnp.inf, sums), n)
        live = append(state.live, parent, token, i)
        rows = (jnp.arange(B)[:, None] * n + parent).reshape(-1)
        at = (starts + i)[:, None]
        logits, cache = step(take(state.cache, rows), token.reshape(-1, 1), at)
        return State(i + 1, cache, logits.reshape(B, n, V), live, sums, done)

    blank = jnp.full((B, n, steps), pad, jnp.int32)
    none = jnp.full((B, n), -jnp.inf)
    state = State(
        jnp.asarray(0),
        take(cache, jnp.repeat(jnp.arange(B), n)),
        jnp.broadcast_to(logits, (B, n, V)),
        blank,
        none.at[:, 0].set(0),  # All beams are the same beginning, so one of them counts.
        Found(blank, jnp.zeros((B, n), jnp.int32), none),
    )
    return jax.lax.while_loop(more, body, state).done


def top(scores: Float[Array, "B n V"], count: int):
    """The greatest of each row: they, their beam and their token, `[B, count]` each."""
    B, _, V = scores.shape
    best, index = jax.lax.top_k(scores.reshape(B, -1), count)
    return best, index // V, (index % V).astype(jnp.int32)


def append(texts, parent, token, i) -> Int[Array, "B n steps"]:
    """The parents' texts with a token each at place `i`."""
    texts = jnp.take_along_axis(texts, parent[..., None], 1)
    return texts.at[:, :, i].set(token)


def keep(old: Found, new: Found, count: int) -> Found:
    """The best of both."""
    every = Found(*(jnp.concatenate(pair, 1) for pair in zip(old, new, strict=True)))
    scores, index = jax.lax.top_k(every.scores, count)
    tokens = jnp.take_along_axis(every.tokens, index[..., None], 1)
    return Found(tokens, jnp.take_along_axis(every.lengths, index, 1), scores)
