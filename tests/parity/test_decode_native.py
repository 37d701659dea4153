"""Recorded models with M-RoPE, token by token after images and videos, say what theirs said."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.cache import Stepper, empty
from tests.parity import native
from tests.parity.case import TOLERANCE
from tests.parity.test_parity import jit, load

CASES = {case.name: case for case in native.CASES}
SEEN = ("patches", "grids", "seconds")
PROMPT = 18  # tokens, with all images and videos among them.


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "qwen2_5_vl" else pytest.mark.slow) for n in CASES],
)
def test_tokens_after_images_are_as_the_whole_text(name):
    inputs, theirs = CASES[name].answers()
    tokens, whole = jnp.asarray(inputs["tokens"]), theirs["logits"]
    prompt = {n: jnp.asarray(inputs[n]) for n in SEEN if n in inputs}
    model, params = load(name)
    variables, rows = {"params": params}, len(tokens)
    seconds = prompt.get("seconds")
    delta = model.delta(tokens[:, :PROMPT], prompt["grids"], seconds=seconds)
    assert (delta < 0).all()
    cache = empty(model, variables, rows, tokens.shape[1])

    @jit
    def both(cache):
        lengths = jnp.full(rows, PROMPT)
        step = Stepper.prompted(model, variables, tokens[:, :PROMPT], lengths, prompt)
        at = jnp.broadcast_to(jnp.arange(PROMPT)[None], (rows, PROMPT))
        found, cache = step(cache, tokens[:, :PROMPT], at, fresh=True)
        out = [found]
        for i in range(PROMPT, PROMPT + 2):
            one, cache = step(cache, tokens[:, i : i + 1], jnp.full((rows, 1), i))
            out.append(one)
        return jnp.concatenate(out, 1)

    found = both(cache)
    np.testing.assert_allclose(found, whole[:, : PROMPT + 2], rtol=0, atol=TOLERANCE)
