"""Who guesses the next tokens for `speculative.sample`: a smaller model, or the text itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxformer.samplers.autoregressive import Step, fold
from jaxformer.samplers.logits import PLAIN, Law


class Draft(NamedTuple):
    """A guesser, as two functions.

    `start(tokens [B, T], lengths [B]) -> state` sees the prompts. `propose(state, text
    [B, L], n [B], keys [B]) -> (tokens [B, ahead], logits [B, ahead, V] or None, state)`
    guesses what follows the first `n` tokens of each text: `logits` are those of the law by
    which each guess was drawn, None where there was nothing to draw. `n` grows by at most
    `ahead + 1` from one call to the next.
    """

    ahead: int
    start: Callable[..., Any]
    propose: Callable[..., Any]


def by_model(step: Step, cache: Any, *, ahead: int, law: Law = PLAIN) -> Draft:
    """Draws `ahead` tokens of a smaller model, by a cache of its own without a token.

    Its rings need `ahead` slots to spare, see `layers.cache.empty`. The nearer its `law` is
    to the text's, the more of its tokens are taken; a penalty it has none.
    """

    def start(tokens, lengths):
        index = jnp.arange(tokens.shape[1])[None]
        at = jnp.where(index < lengths[:, None], index, -1)
        return step(cache, tokens, at, fresh=True, read=lengths[:, None] - 1)[1]

    def propose(cache, text, n, keys):
        # Of what it guessed last time the last token never went in: two may be new.
        at = n[:, None] + jnp.arange(-2, 0)[None]
        last = jnp.take_along_axis(text, jnp.maximum(at, 0), 1)
        read = jnp.ones((len(n), 1), jnp.int32)
        logits, cache = step(cache, last, at, read=read)

        def one(carry, i):
            logits, cache = carry
            found = law.logits(logits)
            token = law.draw(fold(keys, i), logits)
            logits, cache = step(cache, token[:, None], (n + i)[:, None])
            return (logits[:, 0], cache), (token, found)

        # The last guess goes in too: cheaper than a program of its own for it.
        carry, (tokens, found) = jax.lax.scan(one, (logits[:, 0], cache), jnp.arange(ahead))
        return tokens.swapaxes(0, 1), found.swapaxes(0, 1), carry[1]

    return Draft(ahead, start, propose)


def by_lookup(*, ahead: int, grams: int = 3) -> Draft:
    """Guesses that the text goes on as it did where its last tokens stood before.

    That is the latest place where most of the last `grams` tokens stand as at the end; a
    place nearer to the end than `ahead` is read round and round. Source: Saxena 2023,
    "Prompt lookup decoding".
    """

    def start(tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> tuple[()]:
        return ()

    def propose(state, text, n, keys):
        place = jnp.arange(text.shape[1])[None]
        same = place < n[:, None] - 1
        alike = jnp.zeros(text.shape, jnp.int32)
        for back in range(grams):
            mine = jnp.take_along_axis(text, jnp.maximum(n[:, None] - 1 - back, 0), 1)
            same &= (jnp.roll(text, back, 1) == mine) & (place >= back)
            alike += same
        best = (alike * text.shape[1] + place * (alike > 0)).argmax(1)[:, None]
        found = jnp.take_along_axis(alike, best, 1) > 0
        best = jnp.where(found, best, jnp.maximum(n[:, None] - 2, 0))
        period = jnp.maximum(n[:, None] - 1 - best, 1)
        index = best + 1 + jnp.arange(ahead)[None] % period
        return jnp.take_along_axis(text, index, 1), None, state

    return Draft(ahead, start, propose)
