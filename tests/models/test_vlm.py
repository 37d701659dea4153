import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxformer.layers.block import Chain
from jaxformer.layers.cache import Stepper, empty, slots
from jaxformer.layers.connect import Merge, Project
from jaxformer.models.decoder import Decoder
from jaxformer.models.vit import ViT
from jaxformer.models.vlm import VLM, flops
from jaxformer.samplers.autoregressive import sample
from jaxformer.samplers.logits import GREEDY
from tests.layers.test_block import randomized

IMAGE, S = 1, 2  # The token, and features of an image.
MODEL = VLM(
    vision=ViT(12, 1, 20, 3, 2, 0, size=(4, 8), pool="cls"),
    connector=Chain((Merge(2, (2, 4)), Project(16, hidden=18))),
    language=Decoder(vocab=19, width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=2),
    image=IMAGE,
    skip=1,
)


@functools.cache
def params():
    images = jnp.zeros((1, 1, 4, 8, 3))
    made = jax.jit(MODEL.init)(jax.random.key(0), jnp.full((1, 4), 3), images)
    return randomized(made, jax.random.key(1))


@functools.cache
def samples():
    """Texts of 5, 7 and 8 tokens about 1, 0 and 2 images."""
    draw = np.random.default_rng(0)
    found = []
    for text, count in ((3, 1), (7, 0), (4, 2)):
        ids = draw.integers(2, 19, text)
        places = np.sort(draw.integers(0, text, count))
        ids = np.insert(ids, np.repeat(places, S), IMAGE)
        found.append((ids.astype(np.int32), draw.normal(size=(count, 4, 8, 3))))
    return [(ids, images.astype(np.float32)) for ids, images in found]


def row(some, length, images):
    """Samples side by side in a row of so many tokens and images."""
    ids = np.concatenate([ids for ids, _ in some])
    segments = np.concatenate([np.full(len(ids), i + 1) for i, (ids, _) in enumerate(some)])
    pixels = np.concatenate([x for _, x in some])
    spare = length - len(ids)
    pixels = np.pad(pixels, ((0, images - len(pixels)), (0, 0), (0, 0), (0, 0)))
    return [
        jnp.asarray(x)[None]
        for x in (np.pad(ids, (0, spare)), np.pad(segments, (0, spare)), pixels)
    ]


def same_gradients(found, expected):
    """Equal to 1e-5 of each array's largest value. What a softmax adds to every key it takes
    away again: without rotary a key's bias has a gradient of rounding alone, and its measure
    is what was summed, as in the gradient of the kernel beside it."""
    expected = flatten_dict(expected)
    for path, a in flatten_dict(found).items():
        beside = (*path[:-1], "kernel") if path[-2:] == ("key", "bias") else path
        atol = 1e-5 * np.abs(expected[beside]).max()
        np.testing.assert_allclose(a, expected[path], rtol=0, atol=atol, err_msg="/".join(path))


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradient(model, params, tokens, segments, images, weights):
    def total(params):
        y = model.apply({"params": params}, tokens, images, segments=segments)
        return (y * weights).sum(), y

    return jax.grad(total, has_aux=True)(params)


def test_packed_is_padded_is_alone():
    some = samples()
    draw = np.random.default_rng(1)
    weights = [draw.normal(size=(len(ids), 19)).astype(np.float32) for ids, _ in some]

    def run(rows):  # Each: samples, their weights, tokens, images.
        batch = [row(*r[:1], *r[2:]) for r in rows]
        w = [
            np.pad(np.concatenate(r[1]), ((0, r[2] - sum(map(len, r[1]))), (0, 0)))
            for r in rows
        ]
        tokens, segments, images = (jnp.concatenate(x) for x in zip(*batch, strict=True))
        return logits_and_gradient(MODEL, params(), tokens, segments, images, jnp.stack(w))

    packed_grad, packed = run([(some, weights, 22, 4)])
    each = [([s], [w], 10, 2) for s, w in zip(some, weights, strict=True)]
    padded_grad, padded = run(each)
    start = 0
    for i, (ids, _) in enumerate(some):
        stop = start + len(ids)
        np.testing.assert_allclose(packed[0, start:stop], padded[i, : len(ids)], atol=1e-5)
        start = stop
    same_gradients(packed_grad, padded_grad)
    ids, images = some[2]
    alone = jax.jit(MODEL.apply)({"params": params()}, ids[None], jnp.asarray(images)[None])
    np.testing.assert_allclose(alone[0], padded[2, : len(ids)], atol=1e-5)


def test_questions_that_share_an_image_are_as_each_alone():
    (ids, images), text = samples()[0], np.array([4, 5, 6, 7, 8])
    ids = np.sort(ids)[:S]  # The image alone.
    tokens = np.concatenate([ids, text[:2], text[2:], [0]]).astype(np.int32)[None]
    segments = np.array([[1] * S + [2] * 2 + [3] * 3 + [0]], np.int32)
    apply = jax.jit(MODEL.apply)
    variables, images = {"params": params()}, jnp.asarray(images)[None]
    both = apply(variables, tokens, images, jnp.array([S]), segments=segments)
    for first, part in ((S, text[:2]), (S + 2, text[2:])):
        own = jnp.asarray(np.concatenate([ids, part]), jnp.int32)[None]
        alone = apply(variables, own, images)[0, S:]
        np.testing.assert_allclose(both[0, first : first + len(part)], alone, atol=1e-5)


def test_a_prefix_sees_itself_both_ways_and_nothing_after_it():
    ids, images = samples()[2]
    prefix = jnp.asarray(np.arange(len(ids)) < 6)[None]
    variables, images = {"params": params()}, jnp.asarray(images)[None]
    apply = jax.jit(MODEL.apply)

    def run(ids):
        return apply(variables, jnp.asarray(ids)[None], images, prefix=prefix)[0]

    text = np.flatnonzero(ids[:6] != IMAGE)[-1]
    whole = run(ids)
    other = run(np.where(np.arange(len(ids)) == text, 3 + (ids[text] == 3), ids))
    assert (np.abs(other - whole).max(-1) > 1e-4).all()  # All see it.
    last = run(np.where(np.arange(len(ids)) == 7, 3 + (ids[7] == 3), ids))
    np.testing.assert_array_equal(last[:7], whole[:7])
    assert np.abs(last - whole)[7].max() > 1e-4


def test_places_that_are_not_those_of_images_are_refused():
    tokens = jnp.array([[1, 1, 3, 4], [1, 5, 3, 4]])
    images = jnp.ones((2, 1, 4, 8, 3))
    said = (
        r"^row 1 has 1 image tokens \(id 1\), and each of its up to 1 images has 2 features; "
        "write 2 image tokens for each image"
    )
    with pytest.raises(ValueError, match=said):
        MODEL.apply({"params": params()}, tokens, images)
    with pytest.raises(ValueError, match="row 0 has 4 image tokens"):
        MODEL.apply({"params": params()}, jnp.ones((2, 4), int), images)
    # Compiled, it cannot be refused: its row is no number.
    tokens = jnp.array([[1, 1, 1, 3], [1, 1, 5, 3]])
    finite = jnp.isfinite(jax.jit(MODEL.apply)({"params": params()}, tokens, images))
    assert not finite[0].any() and finite[1].all()


def test_greedy_decoding_after_images_is_as_the_whole():
    """Rows with different numbers of images; one program for prompts and what follows."""
    made = [row([s], 10, 2) for s in samples()]
    tokens, segments, images = (jnp.concatenate(x) for x in zip(*made, strict=True))
    lengths, steps = (segments > 0).sum(1), 5
    variables = {"params": params()}
    cache = empty(MODEL, variables, 3, 16)

    @jax.jit
    def generate(images):
        step = Stepper(MODEL, variables, {"images": images})
        how = {"steps": steps, "room": slots(cache), "law": GREEDY}
        return sample(step, cache, tokens, lengths, jax.random.key(0), **how)

    found = generate(images).tokens
    assert (found != IMAGE).all()
    whole = jnp.zeros((3, 15), jnp.int32).at[:, :10].set(tokens)
    for b in range(3):
        whole = whole.at[b, lengths[b] : lengths[b] + steps].set(found[b])
    y = jax.jit(MODEL.apply)(variables, whole, images)
    for b in range(3):
        first = int(lengths[b]) - 1
        greedy = y[b, first : first + steps].argmax(-1)
        np.testing.assert_array_equal(greedy, found[b])
    assert (generate(images[::-1]).tokens != found).any()


def test_operations_are_those_of_both_models():
    found = flops(MODEL, (8,), (2, 4, 8, 3), ())
    assert found > flops(MODEL, (8,), (1, 4, 8, 3), ()) > flops(MODEL, (4,), (1, 4, 8, 3), ())
