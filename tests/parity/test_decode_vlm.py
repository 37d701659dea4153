"""Recorded models that see, token by token after their images, say what theirs said."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.cache import Stepper, empty
from tests.parity import vlm
from tests.parity.case import TOLERANCE
from tests.parity.test_parity import jit, load

CASES = {case.name: case for case in vlm.CASES if case.name != "idefics"}
PROMPT = 11  # tokens, with all images and prefixes among them.


@pytest.mark.parametrize("name", CASES)
def test_tokens_after_images_are_as_the_whole_text(name):
    inputs, theirs = CASES[name].answers()
    tokens, prompt = jnp.asarray(inputs["tokens"]), {"images": jnp.asarray(inputs["images"])}
    model, params = load(name)
    variables = {"params": params}
    if "prefix" in inputs:
        prompt["prefix"] = jnp.asarray(inputs["prefix"][:, :PROMPT])
    cache = empty(model, variables, len(tokens), tokens.shape[1])

    @jit
    def first(cache):
        step = Stepper(model, variables, prompt)
        at = jnp.broadcast_to(jnp.arange(PROMPT)[None], (len(tokens), PROMPT))
        return step(cache, tokens[:, :PROMPT], at, fresh=True)

    @jit
    def then(cache, token, at):
        return Stepper(model, variables)(cache, token, at)

    found, cache = first(cache)
    np.testing.assert_allclose(found, theirs["logits"][:, :PROMPT], rtol=0, atol=TOLERANCE)
    for i in range(PROMPT, tokens.shape[1]):
        found, cache = then(cache, tokens[:, i : i + 1], jnp.full((len(tokens), 1), i))
        np.testing.assert_allclose(found[:, 0], theirs["logits"][:, i], rtol=0, atol=TOLERANCE)
