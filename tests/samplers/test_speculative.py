import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.cache import Stepper, empty, slots
from jaxformer.samplers import autoregressive, draft
from jaxformer.samplers.logits import GREEDY, PLAIN, Law
from jaxformer.samplers.speculative import acceptance, residual, sample
from tests.layers.test_block import randomized
from tests.models.test_decoder import case
from tests.samplers.toy import cache_of, step_of

V, AHEAD = 3, 2
TARGET = jax.random.normal(jax.random.key(0), (V, V))
DRAFT = 2 * jax.random.normal(jax.random.key(1), (V, V))
LAWS = {"plain": (PLAIN, PLAIN), "narrow": (Law(top_k=2), Law(temperature=0.5))}


def true_law(p, first, length):
    """Probabilities of all texts after a token, `[V] * length`."""
    found = np.zeros((V,) * length)
    for text in itertools.product(range(V), repeat=length):
        pairs = zip((first, *text[:-1]), text, strict=True)
        found[text] = np.prod([p[a, b] for a, b in pairs])
    return found


def law_of_rounds(p, propose, first, length):
    """The same of the algorithm, by all that can happen in a round, round after round.

    `propose(text)` gives all guesses with their probability, and the laws they came by.
    """
    found = np.zeros((V,) * length)

    def emit(text, chance):
        if chance == 0:
            return
        if len(text) - 1 >= length:
            found[text[1 : length + 1]] += chance
        else:
            play(text, chance)

    def play(text, chance):
        for guesses, likely, q in propose(text):
            if likely == 0:
                continue
            here = p[np.array([text[-1], *guesses])]
            taken = np.asarray(acceptance(here[:-1], q, np.array(guesses)))
            left = chance * likely
            for i in range(AHEAD + 1):
                rest = here[i] if i == AHEAD else np.asarray(residual(here[i], q[i]))
                stops = left if i == AHEAD else left * (1 - taken[i])
                for x in range(V):
                    emit((*text, *guesses[:i], x), stops * rest[x])
                left = left * taken[i] if i < AHEAD else 0

    play((first,), 1.0)
    return found


@pytest.mark.parametrize("name", LAWS)
def test_the_law_is_that_of_the_model_by_enumeration(name, unchecked):
    law, other = LAWS[name]
    p, q = (np.asarray(jax.nn.softmax(a.logits(b))) for a, b in ((law, TARGET), (other, DRAFT)))

    def by_model(text):
        for guesses in itertools.product(range(V), repeat=AHEAD):
            laws = q[np.array([text[-1], *guesses[:-1]])]
            yield guesses, np.prod(laws[np.arange(AHEAD), guesses]), laws

    def by_lookup(text):  # Whatever it says, here its last token again and again.
        guesses = (text[-1],) * AHEAD
        yield guesses, 1.0, np.eye(V)[np.array(guesses)]

    expected = true_law(p, 0, 3)
    for propose in (by_model, by_lookup):
        found = law_of_rounds(p, propose, 0, 3)
        np.testing.assert_allclose(found, expected, atol=2e-7)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("guesser", ["model", "lookup"])
def test_what_is_drawn_follows_the_law(name, guesser, key):
    law, other = LAWS[name]
    rows = 20_000

    @jax.jit
    def go(key):
        tokens = jnp.zeros((rows, 1), jnp.int32)
        guess = draft.by_lookup(ahead=AHEAD)
        if guesser == "model":
            cache = cache_of(rows, 9)
            guess = draft.by_model(step_of(DRAFT), cache, ahead=AHEAD, law=other)
        return sample(step_of(TARGET), cache_of(rows, 9), guess, tokens,
                      jnp.ones(rows, jnp.int32), key, law=law, steps=3, room=None)  # fmt: skip

    found = go(key)
    counts = np.zeros((V,) * 3)
    np.add.at(counts, tuple(np.asarray(found.tokens).T), 1)
    p = np.asarray(jax.nn.softmax(law.logits(TARGET)))
    expected = true_law(p, 0, 3) * rows
    can = expected > 0
    assert counts[~can].sum() == 0
    assert ((counts - expected)[can] ** 2 / expected[can]).sum() < 26 + 5 * 52**0.5
    assert 0 < found.accepted.sum() < AHEAD * found.rounds.sum()


def generate(model, variables, other, guesser, tokens, lengths, **options):
    B, T = tokens.shape
    cache = empty(model, variables, B, T + options["steps"], spare=4)
    guess = draft.by_lookup(ahead=4)
    if guesser == "model":
        theirs = empty(model, other, B, T + options["steps"] + 4, spare=4)
        guess = draft.by_model(Stepper(model, other), theirs, ahead=4, law=GREEDY)
    return sample(Stepper(model, variables), cache, guess, tokens, lengths,
                  jax.random.key(0), room=slots(cache), law=GREEDY, **options)  # fmt: skip


@pytest.mark.parametrize("guesser", ["model", "itself", "lookup"])
def test_greedy_text_is_that_of_one_token_at_a_time(guesser):
    model, tokens, params, _ = case("mistral")
    model, variables = model.clone(length=None), {"params": params}
    other = {"params": randomized({"params": params}, jax.random.key(5))}
    other = variables if guesser == "itself" else other
    tokens, lengths = tokens[:, :6], jnp.array([4, 1, 6])
    options = {"steps": 12, "stop": ((3, 7),), "pad": 2}
    cache = empty(model, variables, 3, 18)
    plain = jax.jit(functools.partial(
        autoregressive.sample, room=slots(cache), law=GREEDY, **options
    ))  # fmt: skip
    expected = plain(Stepper(model, variables), cache, tokens, lengths, jax.random.key(0))
    kind = "lookup" if guesser == "lookup" else "model"
    found = jax.jit(
        lambda variables, other: generate(
            model, variables, other, kind, tokens, lengths, **options
        )
    )(variables, other)
    for name in ("tokens", "lengths", "ended"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    if guesser == "itself":
        np.testing.assert_array_equal(found.accepted, 4 * found.rounds)


def test_a_lookup_reads_on_where_the_text_stood_before():
    text = jnp.array([[1, 2, 3, 4, 9, 2, 3, 8, 1, 2, 3, 0, 0, 0], [5, 6, 5, 6, 5] + [0] * 9,
                      [1, 2, 3] + [0] * 11, [4] + [0] * 13])  # fmt: skip
    guess = draft.by_lookup(ahead=3)
    found, _, _ = guess.propose((), text, jnp.array([11, 5, 3, 1]), None)
    assert found[:2].tolist() == [[4, 9, 2], [6, 5, 6]]
    assert found[2:].shape == (2, 3)


def test_a_penalty_holds_for_guesses_too():
    table = jnp.zeros((4, 4)) + jnp.array([[5.0, 4.9, 4.8, 4.7]])
    law = Law(temperature=0.0, repetition=1.5)
    nexts = jnp.eye(4)[jnp.array([1, 2, 3, 0])]  # Right guesses, which are then seen.
    guess = draft.by_model(step_of(nexts), cache_of(1, 9), ahead=2, law=GREEDY)
    found = sample(step_of(table), cache_of(1, 9), guess, jnp.array([[0, 2]]), jnp.array([1]),
                   jax.random.key(0), steps=3, room=9, law=law)  # fmt: skip
    assert found.tokens.tolist() == [[1, 2, 3]]
