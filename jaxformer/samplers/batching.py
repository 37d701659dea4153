"""Continuous batching: requests join and leave a running batch, whose shapes stay.

A loop on the host over two programs: one brings a prompt into a row of the batch, chunk by
chunk; the other draws some tokens for every row. Source: Yu et al. 2022, "Orca" (OSDI).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.errors import InputError
from jaxformer.samplers.autoregressive import Step, Stops, Text, fold
from jaxformer.samplers.logits import PLAIN, Law


class Request(NamedTuple):
    """A prompt, how many tokens are wanted at most, and the key they are drawn by."""

    tokens: Any  # [n], ids.
    steps: int
    key: Array


class Reply(NamedTuple):
    """What was drawn for a request: as if it had been alone."""

    number: int  # of the request, from 0.
    tokens: np.ndarray  # [n], the stop sequence among them.
    ended: bool  # by a stop sequence, and not for want of steps.


class State(NamedTuple):
    """The running batch, `R` rows; a row that is done waits for a request."""

    cache: Any
    logits: Float[Array, "R V"]  # of each row's next token.
    place: Int[Array, " R"]  # where that token will stand in its row.
    limit: Int[Array, " R"]  # the most tokens that are drawn.
    keys: Array
    text: Text


def serve(
    step: Step,
    cache: Any,
    requests: Iterable[Request],
    *,
    take: Callable[..., Any],
    put: Callable[..., Any],
    rows: int,
    steps: int,
    room: int | None,
    law: Law = PLAIN,
    stop: Stops = (),
    chunk: int = 64,
    burst: int = 8,
) -> Iterator[Reply]:
    """Replies to requests in the order in which they end.

    A request is taken from `requests` when a row is free. Its tokens are those of
    `autoregressive.sample` for it alone, `key` its row's key, to within the rounding of a
    model that sees other shapes.

    Args:
      step: of the model, see `autoregressive.Step`.
      cache: for so many rows; what is in it does not matter. It is given away.
      requests: any number of them.
      take: `layers.cache.take`.
      put: `layers.cache.put`.
      rows: how many requests run at once.
      steps: the most that any request asks for.
      room: tokens that a row of the cache has room for; None is without end.
      law: what tokens are drawn from.
      stop: sequences of tokens; a text ends where it has drawn one of them.
      chunk: how many tokens of a prompt are seen at once.
      burst: how many tokens are drawn between two looks for rows that are done; a row
        that ends within waits for the rest of it.

    Raises:
      InputError: a prompt that is empty, or a request that asks for too much.
    """
    if not jax.tree_util.all_leaves([step]):
        ready: Any = step
    else:  # A plain function goes into a program by what it is.
        ready = jax.tree_util.Partial(step)
    join = functools.partial(_join, take=take, put=put)
    leave = functools.partial(_draw, law=law, stop=stop, burst=burst)
    waiting = enumerate(requests)
    running: dict[int, int] = {}  # Row to the number of its request.
    state = None
    while True:
        for row in [r for r in range(rows) if r not in running]:
            number, request = next(waiting, (None, None))
            if number is None or request is None:
                break
            prompt = _checked(number, request, steps, room)
            if state is None:
                state = _empty(ready, cache, rows, steps, law, stop)
            state = _enter(state, row, request, prompt)
            for start in range(0, len(prompt), chunk):
                part = np.zeros((1, chunk), np.int32)
                at = np.full((1, chunk), -1, np.int32)
                some = prompt[start : start + chunk]
                part[0, : len(some)] = some
                at[0, : len(some)] = np.arange(start, start + len(some))
                state = join(ready, state, np.int32(row), part, at, np.int32(len(some)))
            running[row] = number
        if not running or state is None:
            return
        state = leave(ready, state)
        text = state.text
        seen = jax.device_get((text.done, text.tokens, text.lengths, text.ended))
        for row, (done, tokens, length, ended) in enumerate(zip(*seen, strict=True)):
            if done and row in running:
                yield Reply(running.pop(row), tokens[:length], bool(ended))


def _checked(number: int, request: Request, steps: int, room: int | None) -> np.ndarray:
    prompt = np.asarray(request.tokens, np.int32)
    if not prompt.size:
        raise InputError(f"request {number} has no tokens; begin it with one, as of a start")
    if not 1 <= request.steps <= steps:
        raise InputError(
            f"request {number} asks for {request.steps} tokens; it may be 1 to steps={steps}"
        )
    if room is not None and prompt.size + request.steps > room:
        raise InputError(
            f"request {number} has {prompt.size} tokens, which with {request.steps} steps are "
            f"more than the {room} slots of the cache; cut it, or make the cache longer"
        )
    return prompt


def _empty(step, cache, rows: int, steps: int, law: Law, stop: Stops) -> State:
    """Rows that are all done, as wide as the logits of the step."""
    tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    logits = jax.eval_shape(step, cache, tokens, tokens)[0]
    return State(cache, *_small(rows, steps, logits.shape[-1], logits.dtype, law, stop))


@functools.partial(jax.jit, static_argnums=range(6))  # Each array one of its own to give away.
def _small(rows: int, steps: int, vocab: int, dtype, law: Law, stop: Stops):
    tokens, zeros = jnp.zeros((rows, 1), jnp.int32), jnp.zeros(rows, jnp.int32)
    text = Text.begin(tokens, zeros, steps, 0, vocab, law, stop)
    text = dataclasses.replace(text, done=jnp.ones(rows, bool))
    keys = jax.random.split(jax.random.key(0), rows)
    return jnp.zeros((rows, vocab), dtype), zeros, zeros + 1, keys, text


def _enter(state: State, row: int, request: Request, prompt: np.ndarray) -> State:
    """With the row cleared for a request; its prompt is not in the cache yet."""
    if request.key.dtype != state.keys.dtype:  # Keys of another kind: all rows have it.
        keys = jnp.stack([request.key] * len(state.place))
        state = state._replace(keys=keys)
    numbers = np.int32(row), np.int32(len(prompt)), np.int32(request.steps)
    seen = None
    if state.text.seen is not None:
        seen = np.zeros(state.logits.shape[-1], bool)
        seen[prompt] = True
    small = (state.place, state.limit, state.keys, state.text)
    place, limit, keys, text = _clear(small, *numbers, request.key, seen)
    return state._replace(place=place, limit=limit, keys=keys, text=text)


@functools.partial(jax.jit, donate_argnums=0)
def _clear(small, row, length, steps, key, seen):
    place, limit, keys, text = small
    text = dataclasses.replace(
        text,
        lengths=text.lengths.at[row].set(0),
        done=text.done.at[row].set(False),
        ended=text.ended.at[row].set(False),
        tail=text.tail.at[row].set(-1),
        seen=None if seen is None else text.seen.at[row].set(seen),
    )
    small = place.at[row].set(length), limit.at[row].set(steps), keys.at[row].set(key)
    return *small, text


@functools.partial(jax.jit, static_argnames=("take", "put"), donate_argnums=1)
def _join(step, state: State, row, tokens, at, count, *, take, put) -> State:
    """With some tokens of a prompt in a row, and the logits after the last of them."""
    index = row[None]
    read = (count - 1)[None, None]
    logits, own = step(take(state.cache, index), tokens, at, read=read)
    cache = put(state.cache, index, own)
    return state._replace(cache=cache, logits=state.logits.at[row].set(logits[0, 0]))


@functools.partial(jax.jit, static_argnames=("law", "stop", "burst"), donate_argnums=1)
def _draw(step, state: State, *, law: Law, stop: Stops, burst: int) -> State:
    """With up to `burst` tokens more in each row that is not done."""

    def body(carry: tuple[Int[Array, ""], State]) -> tuple[Int[Array, ""], State]:
        number, s = carry
        drawn = law.draw(fold(s.keys, s.text.lengths), s.logits, s.text.seen)
        text = s.text.add(drawn[:, None], jnp.ones_like(drawn), stop)
        text = dataclasses.replace(text, done=text.done | (text.lengths >= s.limit))
        at = jnp.where(text.done, -1, s.place)[:, None]
        logits, cache = step(s.cache, drawn[:, None], at)
        s = s._replace(cache=cache, logits=logits[:, 0], place=s.place + 1, text=text)
        return number + 1, s

    def more(carry):
        return (carry[0] < burst) & ~carry[1].text.done.all()

    return jax.lax.while_loop(more, body, (jnp.asarray(0), state))[1]
