import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.connect import Project
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.text import TokenEmbed
from jaxformer.models.qformer import FirstStage, QFormer, Sizes
from jaxformer.models.vit import ViT
from tests.layers.test_block import randomized

F32 = {"dtype": jnp.float32}
SIZES = Sizes(10, depth=2, mlp_dim=14, num_heads=2, reads=True)
FORMER = QFormer(3, 10, SIZES.stack(), text=TokenEmbed(19, 10, 8, **F32))
MODEL = FirstStage(
    ViT(12, 1, 20, 3, 2, 0, size=(4, 8), pool="cls"),
    FORMER,
    Einsum("BQD,DE->BQE", {"E": 6}, True, jnp.float32),
    Einsum("BD,DE->BE", {"E": 6}, True, jnp.float32),
    Einsum("BQD,DV->BQV", {"V": 2}, True, jnp.float32),
    Einsum("BTD,DV->BTV", {"V": 19}, **F32),
    begin=2,
)
TOKENS = jnp.array([[1, 5, 6, 7, 0, 0], [1, 8, 9, 10, 11, 12]])


@functools.cache
def fresh():
    images = jnp.zeros((2, 4, 8, 3))
    return nn.unbox(jax.jit(MODEL.init)(jax.random.key(0), images, TOKENS))["params"]


@functools.cache
def params():
    return randomized({"params": fresh()}, jax.random.key(1))


def images():
    return jax.random.normal(jax.random.key(2), (2, 4, 8, 3))


def test_blip2_has_so_many_parameters():
    """As `Blip2QFormerModel` of transformers with its default config, and its queries."""
    former = QFormer(32, 768, Sizes().stack())
    x = jax.ShapeDtypeStruct((1, 2, 1408), jnp.float32)
    made = jax.eval_shape(former.init, jax.random.key(0), x)
    count = sum(x.size for x in jax.tree.leaves(nn.unbox(made)))
    assert count == 105_137_664 + 32 * 768


@pytest.mark.slow
def test_queries_gather_all_of_an_image_in_any_order(key):
    former = QFormer(3, 10, dataclasses.replace(SIZES, reads=False).stack(), Project(16))
    x = jax.random.normal(key, (2, 5, 12))
    weights = randomized(jax.jit(former.init)(key, x), key)
    assert "cross" in weights["stack"]["block"]["parts_0"]
    assert "cross" not in weights["stack"]["block"]["parts_1"]
    apply = jax.jit(former.apply)
    whole = apply({"params": weights}, x)
    assert whole.shape == (2, 3, 16)
    np.testing.assert_allclose(apply({"params": weights}, x[:, ::-1]), whole, atol=1e-5)
    other = apply({"params": weights}, x.at[0, 4, 0].add(1.0))
    assert jnp.abs(other - whole)[0].max(-1).min() > 1e-4
    np.testing.assert_array_equal(other[1], whole[1])


@pytest.mark.slow
def test_what_is_written_sees_the_image_and_the_words_before_it():
    encode = jax.jit(lambda p, x, t: MODEL.apply({"params": p}, x, t, method="encode"))
    _, image, _, _, written = encode(params(), images(), TOKENS)
    _, same, text, _, other = encode(params(), images(), TOKENS.at[:, 3].set(13))
    np.testing.assert_array_equal(same, image)  # The queries see no text.
    np.testing.assert_array_equal(other[:, :3], written[:, :3])
    assert jnp.abs(other - written)[:, 3:].max(-1).min() > 1e-4
    _, moved, alike, _, other = encode(params(), images() + 1, TOKENS.at[:, 3].set(13))
    assert jnp.abs(other - written).max(-1).min() > 1e-4
    assert jnp.abs(moved - image).max(-1).min() > 1e-4
    np.testing.assert_array_equal(alike, text)  # And the text that is read, no image.
    # The first token is `begin`, whatever stands there.
    *_, other = encode(params(), images(), TOKENS.at[:, 0].set(4))
    np.testing.assert_array_equal(other, written)


@pytest.mark.slow
def test_queries_alone_are_as_with_the_text_after_them():
    def run(model, params):
        return jax.jit(functools.partial(model.apply, method="encode"))(
            {"params": params}, images(), TOKENS
        )

    less = {name: x for name, x in params().items() if name != "head"}
    _, found, _, _, none = run(dataclasses.replace(MODEL, head=None), less)
    assert none is None
    np.testing.assert_allclose(found, run(MODEL, params())[1], atol=1e-6)


@pytest.mark.slow
def test_padding_is_not_seen():
    run = jax.jit(lambda t, real: MODEL.apply({"params": params()}, images(), t, real))
    cosines, matches = run(TOKENS, TOKENS != 0)
    short = TOKENS[:, :4]
    cut, cut_matches = run(short, short != 0)
    np.testing.assert_allclose(cosines[:, 0], cut[:, 0], atol=1e-6)
    np.testing.assert_allclose(matches[0], cut_matches[0], atol=1e-6)
    seen, _ = run(TOKENS, None)
    assert jnp.abs(seen - cosines)[:, 0].max() > 1e-4


def test_what_reads_no_text_says_so(key):
    former = QFormer(3, 10, SIZES.stack())
    with pytest.raises(ValueError, match="this QFormer reads no text"):
        former.init(key, None, TOKENS, method="read")
    with pytest.raises(ValueError, match="num_heads=3 must divide width=10"):
        Sizes(10, num_heads=3).stack()
