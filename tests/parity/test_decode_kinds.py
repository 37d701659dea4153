"""Gemma 3, InternVL and LLaVA-NeXT, token by token after their images, say what theirs said."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.cache import Stepper, empty
from tests.parity import vlm_kinds
from tests.parity.case import TOLERANCE
from tests.parity.test_parity import jit, load

CASES = {case.name: case for case in vlm_kinds.CASES}
PROMPTS = {"gemma3_vlm": 11, "internvl": 11, "llava_next": 17}  # With all images.


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tokens_after_images_are_as_the_whole_text(name):
    inputs, theirs = CASES[name].answers()
    tokens, length = jnp.asarray(inputs["tokens"]), PROMPTS[name]
    seen = {n: jnp.asarray(x) for n, x in inputs.items() if n != "tokens"}
    model, params = load(name)
    variables, rows = {"params": params}, len(tokens)
    cache = empty(model, variables, rows, tokens.shape[1])

    @jit
    def both(cache):
        step = Stepper(model, variables, seen)
        at = jnp.broadcast_to(jnp.arange(length)[None], (rows, length))
        found, cache = step(cache, tokens[:, :length], at, fresh=True)
        out = [found]
        for i in range(length, length + 2):
            one, cache = step(cache, tokens[:, i : i + 1], jnp.full((rows, 1), i))
            out.append(one)
        return jnp.concatenate(out, 1)

    whole = theirs["logits"][:, : length + 2]
    np.testing.assert_allclose(both(cache), whole, rtol=0, atol=TOLERANCE)
