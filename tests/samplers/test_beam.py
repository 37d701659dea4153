import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.cache import Stepper, empty, slots, take
from jaxformer.samplers.beam import search
from tests.models.test_decoder import case
from tests.samplers.toy import cache_of, step_of

V, END = 4, 3
TABLE = 1.5 * jax.random.normal(jax.random.key(3), (V, V))


def every_text(first: int, steps: int, alpha: float):
    """All texts after a token, and their scores, best first."""
    p = np.asarray(jax.nn.log_softmax(TABLE))
    found = {}
    for text in itertools.product(range(V), repeat=steps):
        stop = text.index(END) + 1 if END in text else steps
        text = text[:stop]
        total = sum(p[a, b] for a, b in zip((first, *text[:-1]), text, strict=True))
        found[text] = total / len(text) ** alpha
    return sorted(found.items(), key=lambda x: -x[1])


def rows(cache, index):
    return cache[index]


@pytest.mark.parametrize("alpha", [0.0, 0.7, 2.0])
def test_as_many_beams_as_texts_find_them_all(alpha):
    steps, beams = 3, 40
    go = jax.jit(functools.partial(
        search, step_of(TABLE), take=rows, beams=beams, steps=steps, room=None, ends=(END,),
        alpha=alpha, pad=9,
    ))  # fmt: skip
    found = go(cache_of(2, 8), jnp.array([[1, 2], [0, 9]]), jnp.array([2, 1]))
    for row, first in enumerate((2, 0)):
        expected = every_text(first, steps, alpha)
        assert len(expected) == beams  # 27 and 9 + 3 + 1.
        np.testing.assert_allclose(found.scores[row], [s for _, s in expected], atol=1e-5)
        texts = []
        for text, n in zip(found.tokens[row].tolist(), found.lengths[row], strict=True):
            texts.append(tuple(text[:n]))
            assert set(text[n:]) <= {9}
        assert set(texts) == {t for t, _ in expected} and texts[0] == expected[0][0]


def test_few_beams_find_texts_and_their_true_scores():
    go = jax.jit(functools.partial(
        search, step_of(TABLE), take=rows, beams=2, steps=5, room=9, ends=(END,)
    ))  # fmt: skip
    found = go(cache_of(1, 9), jnp.array([[1]]), jnp.array([1]))
    scores = dict(every_text(1, 5, 1.0))
    for text, n, score in zip(found.tokens[0], found.lengths[0], found.scores[0], strict=True):
        np.testing.assert_allclose(scores[tuple(text[:n].tolist())], score, atol=1e-5)
    assert found.scores[0, 0] >= found.scores[0, 1]


def test_beams_of_a_model_carry_their_own_cache():
    model, tokens, params, _ = case("mistral")
    variables, steps = {"params": params}, 4
    cache = empty(model, variables, 2, 9)
    go = jax.jit(functools.partial(search, take=take, beams=3, steps=steps, room=slots(cache)))
    lengths = jnp.array([5, 2])
    found = go(Stepper(model, variables), cache, tokens[:2, :5], lengths)
    text = jnp.pad(jnp.repeat(tokens[:2, :5], 3, 0), ((0, 0), (0, steps)))
    starts = jnp.repeat(lengths, 3)[:, None]
    text = text.at[jnp.arange(6)[:, None], starts + jnp.arange(steps)[None]].set(
        found.tokens.reshape(6, steps)
    )
    p = jax.nn.log_softmax(jax.jit(model.apply)(variables, text))
    total = 0.0
    for i in range(steps):
        at = starts[:, 0] + i
        total += p[jnp.arange(6), at - 1, text[jnp.arange(6), at]]
    np.testing.assert_allclose(found.scores.reshape(6), total / steps, atol=1e-4)
