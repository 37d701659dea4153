"""Every recorded language model, token by token with a cache, says what the original said."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.cache import empty
from tests.parity import language
from tests.parity.case import TOLERANCE
from tests.parity.test_parity import jit, load

CASES = {case.name: case for case in language.CASES}
# The others' layers are of the same kinds.
DEFAULT = ("llama", "mistral", "gpt2", "gemma3", "qwen3_moe")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in CASES]
)
def test_tokens_one_by_one_are_as_the_whole_text(name):
    inputs, theirs = CASES[name].answers()
    tokens, whole = jnp.asarray(inputs["tokens"]), theirs["logits"]
    model, params = load(name)
    if name == "llama_dynamic":  # Its angles are those of the length of the text at hand.
        tokens = tokens[:, :7]
        whole = np.asarray(jit(model.apply)({"params": params}, tokens))

    @jit
    def step(cache, tokens, at):
        variables = {"params": params, "cache": cache}
        logits, new = model.apply(variables, tokens, positions=at, mutable=["cache"])
        return logits[:, 0], new["cache"]

    cache = empty(model, {"params": params}, len(tokens), 12)
    for i in range(7):  # More than the windows and what a ring has room for.
        logits, cache = step(cache, tokens[:, i : i + 1], jnp.array([[i]]))
        np.testing.assert_allclose(logits, whole[:, i], rtol=0, atol=TOLERANCE)
