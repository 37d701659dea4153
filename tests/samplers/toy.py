"""A language whose next token depends on the last one alone, and which keeps no cache.

Its cache is the tokens it was given, so that a wrong position or a stale token shows.
"""

import jax.numpy as jnp


def step_of(table):
    """A step by a table `[V, V]` of logits: those after each token."""

    def step(cache, tokens, positions, *, fresh=False, read=None):
        S = cache.shape[1]
        row = jnp.arange(len(tokens))[:, None]
        cache = cache.at[row, jnp.where(positions < 0, S, positions)].set(tokens, mode="drop")
        held = jnp.take_along_axis(cache, jnp.maximum(positions, 0), 1)
        logits = table[held]
        if read is not None:
            logits = jnp.take_along_axis(logits, read[..., None], 1)
        return logits, cache

    return step


def cache_of(rows, length):
    return jnp.full((rows, length), -1, jnp.int32)
