import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.samplers import logits as laws
from jaxformer.samplers.logits import GREEDY, Law

P = jnp.array([0.05, 0.4, 0.1, 0.3, 0.15])
CASES = {
    "top_k": (Law(top_k=2), [0, 4, 0, 3, 0]),
    "top_k of all": (Law(top_k=9), [0.5, 4, 1, 3, 1.5]),
    "top_p": (Law(top_p=0.75), [0, 4, 0, 3, 1.5]),
    "top_p of a sum it meets": (Law(top_p=0.39), [0, 1, 0, 0, 0]),
    "top_p of one": (Law(top_p=1.0), [0.5, 4, 1, 3, 1.5]),
    "min_p": (Law(min_p=0.3), [0, 4, 0, 3, 1.5]),
    "temperature": (Law(temperature=0.5), [0.25, 16, 1, 9, 2.25]),
    "top_p of what temperature and top_k leave": (
        Law(temperature=0.5, top_k=3, top_p=0.9),
        [0, 16, 0, 9, 0],
    ),
    "greedy": (GREEDY, [0, 1, 0, 0, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_law_leaves_what_it_says(name):
    law, weights = CASES[name]
    rows = jnp.log(jnp.stack([P, jnp.roll(P, 1)]))
    found = jax.jit(lambda x: jax.nn.softmax(law.logits(x)))(rows)
    expected = np.asarray(weights, np.float32) / sum(weights)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    np.testing.assert_allclose(found[1], np.roll(expected, 1), atol=1e-6)


def test_what_meets_the_sum_ends_it():
    """In float32 the first two have all of it, so that no third is needed."""
    found = laws.top_p(jnp.array([0.0, 1.0, -200.0]), 1.0)
    assert found.tolist() == [0.0, 1.0, -jnp.inf]


def test_what_was_seen_is_less_probable():
    seen = jnp.array([True, True, False])
    found = Law(repetition=2.0).logits(jnp.array([1.0, -1.0, 1.0]), seen)
    np.testing.assert_allclose(found, [0.5, -2.0, 1.0])


def test_laws_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.generation.logits_process")
    x = 3 * np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, 40, (4, 9))
    seen = np.zeros((4, 40), bool)
    np.put_along_axis(seen, ids, True, 1)
    y, seen = jnp.asarray(x), jnp.asarray(seen)
    pairs = [
        (laws.top_k(y, 7), theirs.TopKLogitsWarper(7)),
        (laws.top_p(y, 0.8), theirs.TopPLogitsWarper(0.8)),
        (laws.min_p(y, 0.1), theirs.MinPLogitsWarper(0.1)),
        (laws.penalize(y, seen, 1.3), theirs.RepetitionPenaltyLogitsProcessor(1.3)),
    ]
    for ours, other in pairs:
        expected = other(torch.from_numpy(ids), torch.from_numpy(x.copy())).numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_greedy_takes_the_first_of_those_that_tie():
    assert int(GREEDY.draw(jax.random.split(jax.random.key(0), 1), jnp.ones((1, 4)))[0]) == 0


@pytest.mark.parametrize(
    "options", [{"top_p": 0.0}, {"temperature": -1.0}, {"top_k": 0}, {"repetition": 0.0}]
)
def test_numbers_that_mean_nothing_are_refused(options):
    with pytest.raises(InputError, match="must be"):
        Law(**options)
