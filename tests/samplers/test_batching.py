import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.layers.cache import Stepper, empty, put, take
from jaxformer.samplers.autoregressive import sample
from jaxformer.samplers.batching import Request, serve
from jaxformer.samplers.logits import GREEDY, Law
from tests.models.test_decoder import case
from tests.samplers.toy import cache_of, step_of

SIZES = [(5, 9), (1, 3), (11, 2), (4, 1), (7, 8), (2, 9), (10, 4)]  # Prompt and steps.


def requests_of(sizes, vocab=17):
    rng, key = np.random.default_rng(0), jax.random.key(7)
    return [
        Request(rng.integers(0, vocab, n), steps, jax.random.fold_in(key, i))
        for i, (n, steps) in enumerate(sizes)
    ]


@pytest.mark.parametrize("law", [GREEDY, Law(top_k=9, repetition=1.2)], ids=["greedy", "drawn"])
def test_texts_are_those_of_each_request_alone(law):
    model, _, params, _ = case("mistral")
    model, variables = model.clone(length=None), {"params": params}
    step, stop, requests = Stepper(model, variables), ((3,), (7, 1)), requests_of(SIZES)
    cache = empty(model, variables, 3, 20)
    options = {"steps": 9, "room": 20, "law": law, "stop": stop}
    replies = list(
        serve(step, cache, requests, take=take, put=put, rows=3, chunk=4, burst=3, **options)
    )
    assert sorted(r.number for r in replies) == list(range(len(requests)))
    keys = [r.key[None] for r in requests]
    alone = jax.jit(functools.partial(sample, **options))
    for reply in replies:
        request = requests[reply.number]
        tokens, lengths = np.zeros((1, 11), np.int32), np.array([len(request.tokens)])
        tokens[0, : lengths[0]] = request.tokens
        one = empty(model, variables, 1, 20)
        found = alone(step, one, jnp.asarray(tokens), jnp.asarray(lengths), keys[reply.number])
        found = jax.device_get(found)
        length = min(int(found.lengths[0]), request.steps)
        np.testing.assert_array_equal(reply.tokens, found.tokens[0, :length])
        assert reply.ended == bool(found.ended[0] and found.lengths[0] <= request.steps)


def test_short_requests_do_not_wait_for_long_ones():
    calls = []

    def step(cache, tokens, positions, **options):
        if tokens.shape[1] == 1:
            jax.debug.callback(lambda: calls.append(1))
        return step_of(jnp.zeros((4, 4)))(cache, tokens, positions, **options)

    sizes = [(2, 40)] + [(2, 4)] * 9
    replies = serve(
        step, cache_of(2, 50), requests_of(sizes, 4), take=lambda c, r: c[r],
        put=lambda c, r, o: c.at[r].set(o), rows=2, steps=40, room=50, burst=2, chunk=3,
    )  # fmt: skip
    assert [r.number for r in replies][-1] == 0
    jax.effects_barrier()
    assert len(calls) <= 44  # and not 40 + 4 * 4.


@pytest.mark.parametrize(
    "size, message",
    [((0, 3), "request 0 has no tokens"), ((9, 3), "more than the 10 slots"), ((1, 6), "1 to")],
)
def test_requests_that_do_not_fit_are_refused(size, message):
    step = step_of(jnp.zeros((17, 17)))
    asked = serve(step, cache_of(1, 9), requests_of([size]), take=None.__eq__, put=None.__eq__,
                  rows=1, steps=5, room=10)  # fmt: skip
    with pytest.raises(InputError, match=message):
        list(asked)
