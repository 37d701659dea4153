"""Models whose images go by queries or gates, token by token, say what theirs said."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.cache import Stepper, empty
from tests.parity import mllama, queries
from tests.parity.case import TOLERANCE
from tests.parity.test_parity import jit, load

CASES = {case.name: case for case in (*queries.CASES, *mllama.CASES) if case.name != "opt"}
PROMPT = 9  # tokens, with all images among them.


@pytest.mark.slow  # Many compiles; what they share with other models is tested with those.
@pytest.mark.parametrize("name", CASES)
def test_tokens_after_images_are_as_the_whole_text(name):
    inputs, theirs = CASES[name].answers()
    tokens = jnp.asarray(inputs["tokens"])
    prompt = {k: jnp.asarray(x) for k, x in inputs.items() if k != "tokens"}
    model, params = load(name)
    variables = {"params": params}
    cache = empty(model, variables, len(tokens), tokens.shape[1])

    @jit
    def first(cache):
        at = jnp.broadcast_to(jnp.arange(PROMPT)[None], (len(tokens), PROMPT))
        lengths = jnp.full(len(tokens), PROMPT)
        # The text of mllama looks at the images again and again: they are `then`.
        step = Stepper.prompted(model, variables, tokens[:, :PROMPT], lengths, prompt)
        return *step(cache, tokens[:, :PROMPT], at, fresh=True), step.then

    @jit
    def after(cache, token, at):
        return Stepper(model, variables, then=then)(cache, token, at)

    found, cache, then = first(cache)
    np.testing.assert_allclose(found, theirs["logits"][:, :PROMPT], rtol=0, atol=TOLERANCE)
    for i in range(PROMPT, tokens.shape[1]):
        found, cache = after(cache, tokens[:, i : i + 1], jnp.full((len(tokens), 1), i))
        np.testing.assert_allclose(found[:, 0], theirs["logits"][:, i], rtol=0, atol=TOLERANCE)
