import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.cache import Stepper, empty, slots
from jaxformer.models import vlm
from jaxformer.models.flamingo import Flamingo, flops, gated, latest
from jaxformer.models.vlm import VLM
from jaxformer.samplers.autoregressive import sample
from jaxformer.samplers.logits import GREEDY
from tests.layers.test_block import randomized
from tests.models import test_vlm

IMAGE = test_vlm.IMAGE
BASE: VLM = test_vlm.MODEL
MODEL = Flamingo(BASE.vision, BASE.connector, gated(BASE.language), IMAGE, skip=1)


@functools.cache
def start():
    images = jnp.zeros((1, 1, 4, 8, 3))
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.full((1, 4), 3), images)


@functools.cache
def params():
    return randomized(start(), jax.random.key(1))


@functools.cache
def samples():
    """Texts about 1, 0 and 2 images, each one token."""
    draw = np.random.default_rng(0)
    found = []
    for text, starts in ((5, [1]), (6, []), (8, [0, 4])):
        ids = draw.integers(2, 19, text)
        ids[starts] = IMAGE
        images = draw.normal(size=(len(starts), 4, 8, 3))
        found.append((ids.astype(np.int32), images.astype(np.float32)))
    return found


def row(some, length, images):
    return test_vlm.row(some, length, images)


def alone(params):
    """The same parameters without those of the gated layers."""
    block = params["language"]["stack"]["block"]["parts_1"]
    return params["language"] | {"stack": {"block": block}}


def test_text_is_the_language_model_alone_and_shut_gates_let_no_image_in():
    """Exactly: layers that see are left out, or add nothing."""
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 2, 19)
    images = jax.random.normal(jax.random.key(4), (2, 1, 4, 8, 3))
    tokens = tokens.at[:, 2].set(IMAGE)
    fresh = jax.tree.map(jnp.asarray, start()["params"])
    text = jax.jit(BASE.language.apply)({"params": alone(fresh)}, tokens)
    apply = jax.jit(MODEL.apply)
    np.testing.assert_array_equal(apply({"params": fresh}, tokens), text)
    np.testing.assert_array_equal(apply({"params": fresh}, tokens, images), text)
    # Gates that are open let images in, and text is still the language model alone.
    text = jax.jit(BASE.language.apply)({"params": alone(params())}, tokens)
    np.testing.assert_array_equal(apply({"params": params()}, tokens), text)
    assert np.abs(apply({"params": params()}, tokens, images) - text)[:, 2:].max() > 1e-2


def test_a_token_sees_the_image_before_it():
    ids, images = samples()[2]
    run = jax.jit(MODEL.apply)
    variables, tokens = {"params": params()}, jnp.asarray(ids)[None]
    whole = run(variables, tokens, jnp.asarray(images)[None])
    other = run(variables, tokens, jnp.asarray(images)[None].at[0, 1, 0].add(1.0))
    np.testing.assert_array_equal(other[0, :4], whole[0, :4])
    assert (np.abs(other - whole)[0, 4:].max(-1) > 1e-4).all()


@pytest.mark.parametrize(
    ("tokens", "segments", "shared", "seen"),
    [
        ([5, 1, 5, 1, 1, 5], None, None, [0, 1, 1, 2, 3, 3]),
        ([1, 5, 5, 5, 1, 5], [1, 1, 2, 2, 2, 0], None, [1, 1, 0, 0, 2, 0]),
        ([1, 5, 5, 5, 1, 5], [1, 1, 2, 3, 3, 3], 2, [1, 1, 1, 1, 2, 2]),
    ],
)
def test_the_last_image_of_a_segment_is_seen(tokens, segments, shared, seen):
    given = [None if x is None else jnp.array([x]) for x in (segments, shared)]
    np.testing.assert_array_equal(latest(jnp.array([tokens]) == 1, *given), [seen])


@pytest.mark.slow  # test_vlm has the same of masks; here are the images' numbers.
def test_packed_is_padded():
    some = samples()
    packed = row(some, 20, 3)
    padded = [jnp.concatenate(x) for x in zip(*(row([s], 9, 2) for s in some), strict=True)]

    variables = {"params": params()}

    @jax.jit
    def run(tokens, segments, images):
        return MODEL.apply(variables, tokens, images, segments=segments)

    packed, padded = run(*packed), run(*padded)
    first = 0
    for i, (ids, _) in enumerate(some):
        last = first + len(ids)
        np.testing.assert_allclose(packed[0, first:last], padded[i, : len(ids)], atol=1e-5)
        first = last


def test_greedy_decoding_is_as_the_whole():
    tokens, segments, images = (
        jnp.concatenate(x) for x in zip(*(row([s], 9, 2) for s in samples()), strict=True)
    )
    lengths, steps = (segments > 0).sum(1), 5
    variables = {"params": params()}
    cache = empty(MODEL, variables, 3, 16)
    last = latest(tokens == IMAGE)[:, -1:]

    @jax.jit
    def generate(images):
        step = Stepper.prompted(MODEL, variables, tokens, lengths, {"images": images})
        how = {"steps": steps, "room": slots(cache), "law": GREEDY}
        return sample(step, cache, tokens, lengths, jax.random.key(0), **how)

    found = generate(images).tokens
    whole = jnp.zeros((3, 14), jnp.int32).at[:, :9].set(tokens)
    for b in range(3):
        whole = whole.at[b, lengths[b] : lengths[b] + steps].set(found[b])
    seen = jnp.concatenate([latest(tokens == IMAGE), jnp.repeat(last, 5, 1)], 1)

    @jax.jit
    def at_once(images):
        features = MODEL.apply(variables, images, method="encode")
        return MODEL.apply(variables, whole, features=features, seen=seen)

    y = at_once(images)
    for b in range(3):
        first = int(lengths[b]) - 1
        np.testing.assert_array_equal(y[b, first : first + steps].argmax(-1), found[b])
    assert (generate(images[::-1]).tokens != found).any()


def test_what_does_not_fit_is_refused():
    images = jnp.ones((1, 1, 4, 8, 3))
    with pytest.raises(ValueError, match="row 0 has 2 image tokens"):
        MODEL.apply({"params": params()}, jnp.array([[1, 1, 3]]), images)
    with pytest.raises(ValueError, match="every=3 must divide depth=2"):
        gated(BASE.language, 3)
    y = jax.jit(MODEL.apply)({"params": params()}, jnp.array([[1, 1, 3]]), images)
    assert not jnp.isfinite(y).any()


def test_every_second_layer_may_see():
    model = gated(dataclasses.replace(BASE.language, depth=4), 2)
    assert model.stack.depth == 2 and len(model.stack.block.parts) == 3


def test_operations_are_those_of_the_layers_that_see_too():
    found = flops(MODEL, (8,), (1, 4, 8, 3), own=BASE.language, keys=2)
    # Of two layers of width 16: queries, results, MLP; keys and values of two features.
    layer = 2 * 8 * 16 * 16 + 2 * 2 * 16 * 8 + 2 * 8 * 2 * 16 + 8 * 3 * 16 * 24
    assert found == vlm.flops(BASE, (8,), (1, 4, 8, 3)) + 2 * 2 * layer
