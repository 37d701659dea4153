"""Packed equals padded equals each image alone: values and gradients; padding is nothing."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.pack import pack
from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Stack
from jaxformer.layers.embed import GridAngles, GridPosition, PatchEmbed
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pack import (
    PackedAngles,
    PackedAttentionPool,
    PackedAverage,
    PackedEmbed,
    PackedPosition,
)
from jaxformer.layers.pool import AttentionPool, Average
from jaxformer.models.vit import Encoder

D, PATCH, SHAPES = 8, 2, [(4, 6), (8, 4), (2, 10)]
KINDS = ("learned and MAP", "rotary and mean")
F32 = {"dtype": jnp.float32}
# Little is computed here, so that compiling is what takes time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)


def encoder(kind, packed):
    attention = functools.partial(Attention, 2, D // 2, use_bias=True, **F32)
    mlp = functools.partial(Mlp, 12, use_bias=True, **F32)
    stack = Stack(Block(attention(), mlp()), 2)
    if kind == "learned and MAP":
        position = PackedPosition(D, (3, 5))
        if not packed:
            position = GridPosition(D, (3, 5), method="bilinear", antialias=True)
        where = {"position": position}
        pool = (PackedAttentionPool if packed else AttentionPool)(attention(), mlp())
    else:
        where = {"rotary": (PackedAngles if packed else GridAngles)(D // 2)}
        pool = PackedAverage() if packed else Average()
    embed = PackedEmbed if packed else PatchEmbed
    embed = embed(PATCH, D, **where, channels=1, **F32)
    return Encoder(embed, stack, LayerNorm(), pool, num_classes=3, **F32)


def images():
    draw = np.random.default_rng(0)
    return [draw.normal(size=(*shape, 1)).astype("float32") for shape in SHAPES]


@functools.cache
def parameters(kind):
    """The same for both, which have equal trees."""
    example = jnp.zeros((1, 6, 10, 1))
    alone = encoder(kind, False)
    shapes = nn.unbox(jax.eval_shape(alone.init, jax.random.key(0), example))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(draw.normal(0, 0.5, p.shape), "f4"), shapes)


# What each image's three logits weigh in the sum of which gradients are taken.
WEIGHTS = np.random.default_rng(2).normal(size=(len(SHAPES), 3)).astype("float32")


@functools.cache
def alone(kind):
    """Each image by itself, by the parts for one image a row: logits and gradients."""
    model = encoder(kind, False)

    def loss(params):
        found = [model.apply(params, jnp.asarray(image)[None])[0] for image in images()]
        return (jnp.stack(found) * WEIGHTS).sum(), jnp.stack(found)

    grads, logits = jit(jax.grad(loss, has_aux=True))(parameters(kind))
    return np.asarray(logits), grads


@functools.cache
def packed(kind):
    """The step of packed rows: (params, patches, grids, weights of slots) -> the same."""
    model = encoder(kind, True)

    def loss(params, patches, grids, weights):
        found = model.apply(params, patches, grids)
        return (found * weights).sum(), found

    return jit(jax.grad(loss, has_aux=True, argnums=(0, 1)))


def laid(made):
    """Weights of the slots, and where each image's slot is."""
    index = made["index"].reshape(-1)
    weights = np.where((index >= 0)[:, None], WEIGHTS[np.maximum(index, 0)], 0)
    slots = [int(np.flatnonzero(index == i)[0]) for i in range(len(SHAPES))]
    return weights, slots


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_padded_equals_alone(kind):
    logits, grads = alone(kind)
    for length, count in ((12, 3), (8, 1)):  # Several images a row; one, and padding.
        made = pack(images(), patch=PATCH, length=length, count=count)
        assert (made["index"] < 0).any() == (count > 1)
        weights, slots = laid(made)
        step = packed(kind)(parameters(kind), made["patches"], made["grids"], weights)
        (found, _), answers = step
        np.testing.assert_allclose(answers[np.array(slots)], logits, atol=1e-5)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(grads), strict=True):
            assert abs(a - b).max() / np.maximum(abs(b).max(), 1) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_padding_reaches_nothing(kind):
    made = pack(images(), patch=PATCH, length=12, count=3)
    step, (weights, _) = packed(kind), laid(made)
    before = step(parameters(kind), made["patches"], made["grids"], weights)
    lengths = made["grids"].prod(-1).sum(-1)
    padding = np.arange(12)[None] >= lengths[:, None]
    assert padding.any()
    patches = np.where(padding[..., None], np.nan, made["patches"])
    after = step(parameters(kind), patches, made["grids"], weights)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not np.asarray(after[0][1])[padding].any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_sees_itself_alone(kind):
    """Its logits have no gradient of another's patches; slots without an image are 0."""
    made = pack(images(), patch=PATCH, length=12, count=3)
    model, index = encoder(kind, True), made["index"]

    def first(patches, grids):
        features = model.apply(parameters(kind), patches, grids, method="features")
        return (features[0] * jnp.arange(D)).sum(), features

    grad, features = jit(jax.grad(first, has_aux=True))(made["patches"], made["grids"])
    own = made["grids"][0, 0].prod()
    assert (grad[0, :own] != 0).any(-1).all()
    assert not grad[0, own:].any() and not grad[1:].any()
    assert (np.asarray(features).any(-1) == (index.reshape(-1) >= 0)).all()


def test_patches_of_another_size_are_told(key):
    embed = PackedEmbed(PATCH, D, channels=3)
    with pytest.raises(
        ValueError, match=r"patches have 4 numbers; the model takes 2 \* 2 \* 3"
    ):
        embed.init(key, jnp.zeros((1, 5, 4)), jnp.ones((1, 1, 2), jnp.int32))
