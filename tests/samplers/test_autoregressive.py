import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.layers.cache import Stepper, empty, slots
from jaxformer.samplers.autoregressive import sample
from jaxformer.samplers.logits import GREEDY, Law
from tests.models.test_decoder import case
from tests.samplers.toy import cache_of, step_of

STATIC = ("steps", "room", "law", "stop", "pad")
run = jax.jit(sample, static_argnames=STATIC)
NEXT = 50 * jnp.eye(6)[jnp.array([1, 2, 3, 4, 5, 0])]  # After t comes t + 1.


def toy(table, **options):
    return jax.jit(functools.partial(sample, step_of(table), room=None, **options))


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_greedy_text_is_that_of_the_whole_model(name):
    model, tokens, params, _ = case(name)
    variables = {"params": params}
    prompts, lengths = tokens[:, :6], jnp.array([4, 1, 6])
    cache = empty(model, variables, 3, 11)
    found = run(
        Stepper(model, variables), cache, prompts, lengths, jax.random.key(0), steps=5,
        room=slots(cache), law=GREEDY,
    )  # fmt: skip
    apply = jax.jit(model.apply)
    text = jnp.pad(prompts, ((0, 0), (0, 6)))
    for i in range(5):
        logits = apply(variables, text)
        last = jnp.take_along_axis(logits, (lengths + i - 1)[:, None, None], 1)[:, 0]
        text = text.at[jnp.arange(3), lengths + i].set(last.argmax(-1))
    expected = jnp.take_along_axis(text, lengths[:, None] + jnp.arange(5)[None], 1)
    np.testing.assert_array_equal(found.tokens, expected)
    assert found.lengths.tolist() == [5, 5, 5] and not found.ended.any()


def test_a_row_ends_at_its_stop_sequence():
    go = toy(NEXT, steps=6, law=GREEDY, stop=((3, 4), (0,)), pad=9)
    found = go(cache_of(3, 20), jnp.array([[0, 1], [3, 8], [4, 5]]), jnp.array([2, 1, 2]),
               jax.random.key(0))  # fmt: skip
    expected = [[2, 3, 4, 9, 9, 9], [4, 5, 0, 9, 9, 9], [0, 9, 9, 9, 9, 9]]
    assert found.tokens.tolist() == expected  # The prompt's own 3 ends nothing.
    assert found.lengths.tolist() == [3, 3, 1] and found.ended.all()


def test_it_stops_when_every_row_has_ended():
    calls = []

    def step(cache, tokens, positions, **options):
        jax.debug.callback(lambda: calls.append(1))
        return step_of(NEXT)(cache, tokens, positions, **options)

    go = jax.jit(functools.partial(sample, step, room=None, steps=50, law=GREEDY, stop=((5,),)))
    found = go(cache_of(2, 9), jnp.array([[2], [4]]), jnp.array([1, 1]), jax.random.key(0))
    jax.effects_barrier()
    assert found.lengths.tolist() == [3, 1] and len(calls) < 5


def test_text_follows_the_law_and_each_row_its_own_key(key):
    table = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]))
    rows = 20_000
    go = toy(table, steps=2, law=Law())
    found = np.asarray(
        go(cache_of(rows, 4), jnp.zeros((rows, 1), jnp.int32), jnp.ones(rows, jnp.int32), key)
        .tokens
    )  # fmt: skip
    p = np.exp(np.asarray(table))
    expected = p[0][:, None] * p * rows
    counts = np.zeros((3, 3))
    np.add.at(counts, (found[:, 0], found[:, 1]), 1)
    assert ((counts - expected) ** 2 / expected).sum() < 30  # 8 +- 4.
    keys = jax.random.split(key, rows)
    alone = go(cache_of(2, 4), jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32), keys[5:7])
    np.testing.assert_array_equal(alone.tokens, found[5:7])


def test_a_penalty_looks_at_prompt_and_text():
    go = toy(jnp.zeros((4, 4)) + jnp.array([[5.0, 4.9, 4.8, 4.7]]), steps=3,
             law=Law(temperature=0.0, repetition=1.5))  # fmt: skip
    found = go(cache_of(1, 9), jnp.array([[0, 2]]), jnp.array([1]), jax.random.key(0))
    assert found.tokens.tolist() == [[1, 2, 3]]


def test_prompts_that_do_not_fit_are_refused():
    ask = functools.partial(sample, step_of(NEXT), cache_of(1, 9), jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(InputError, match="4 tokens and 6 steps are more than the 9 slots"):
        ask(jnp.array([4]), jax.random.key(0), steps=6, room=9)
    with pytest.raises(InputError, match="a prompt is empty"):
        ask(jnp.array([0]), jax.random.key(0), steps=2, room=9)
