"""The likeliest text after an image and a question, token by token as it comes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.layers.cache import Stepper, empty

FILL = 8  # tokens: prompts are as long as a multiple of it.


def likeliest(
    model: Any, params: Any, steps: int
) -> Callable[[Sequence[int], np.ndarray], Iterator[int]]:
    """Who gives up to `steps` ids after a prompt about an image, one after the other.

    It is called with the prompt's ids and an image `[Y, X, C]`, float32.
    """

    # One row does not divide over a mesh: it is laid out by no rules.
    @jax.jit
    def first(params, tokens, lengths, images):
        variables, T = {"params": params}, tokens.shape[1]
        step = Stepper.prompted(model, variables, tokens, lengths, {"images": images})
        at = jnp.where(jnp.arange(T)[None] < lengths[:, None], jnp.arange(T)[None], -1)
        cache = empty(model, variables, 1, T + steps)
        logits, cache = step(cache, tokens, at, fresh=True, read=lengths[:, None] - 1)
        return logits[:, -1].argmax(-1), cache, step.then

    @jax.jit
    def after(params, then, cache, word, at):
        step = Stepper(model, {"params": params}, then=then)
        logits, cache = step(cache, word[:, None], at[:, None])
        return logits[:, -1].argmax(-1), cache

    def draw(prompt: Sequence[int], image: np.ndarray) -> Iterator[int]:
        tokens = jnp.array([[*prompt, *[0] * (-len(prompt) % FILL)]])
        at, images = jnp.array([len(prompt)]), jnp.asarray(image)[None, None]
        word, cache, then = first(params, tokens, at, images)
        for number in range(steps):
            yield int(word[0])
            if number < steps - 1:
                word, cache = after(params, then, cache, word, at + number)

    return draw
