import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.norm import LayerNorm
from jaxformer.models import vit
from jaxformer.models.vit import SIZES, ViT, attention_map, flops, named
from jaxformer.ops.activation import gelu_tanh

# Parameters at 224 pixels, 1,000 classes, class token: what timm counts for the sizes it
# has; M and So400m with the class token and head of the others.
COUNTS = {
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "M/16": 38_837_736,
    "B/16": 86_567_656,
    "L/16": 304_326_632,
    "So400m/14": 413_597_656,
    "H/14": 632_045_800,
    "g/14": 1_012_611_432,
    "G/14": 1_844_440_680,
}
TINY = {"width": 24, "depth": 2, "mlp_dim": 40, "num_heads": 3, "patch": 4, "num_classes": 5}


def shapes(model, size=224):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))["params"]


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert sum(p.size for p in jax.tree.leaves(shapes(named(name)))) == COUNTS[name]


def test_no_named_size_is_untested():
    assert {name.split("/")[0] for name in COUNTS} == set(SIZES)


def test_a_name_that_is_none_lists_those_that_are():
    with pytest.raises(ValueError, match=r"'XL/16' is no ViT; .*Ti, S, M, B, L"):
        named("XL/16")


def test_the_parameter_tree_is_a_public_format():
    paths = {
        "/".join(k.key for k in path)
        for path, _ in jax.tree.leaves_with_path(shapes(ViT(**TINY, registers=1), 8))
    }
    block = "stack/block/"
    linear = [f"{block}attention/{n}" for n in ("query", "key", "value", "out")]
    linear += [f"{block}mlp/up", f"{block}mlp/down", "embed/patch", "head"]
    norms = [f"{block}attention_norm", f"{block}mlp_norm", "norm"]
    expected = {f"{n}/{leaf}" for n in linear for leaf in ("kernel", "bias")}
    expected |= {f"{n}/{leaf}" for n in norms for leaf in ("scale", "bias")}
    expected |= {f"embed/{n}/embedding" for n in ("cls", "registers", "position")}
    assert paths == expected


VARIANTS = {
    "cls learned": {},
    "gap sincos": {"pool": "gap", "positions": "sincos"},
    "map rotary": {"pool": "map", "positions": "rotary"},
    "registers": {"registers": 2, "positions": "sincos"},
    "registers gap rotary": {"registers": 2, "pool": "gap", "positions": "rotary"},
    "qk-norm, layer scale": {"qk_norm": True, "layer_scale": 0.1},
    "as big_vision": {"pool": "tok", "activation": gelu_tanh, "rep_size": 20},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_from_every_parameter(name, key):
    model = ViT(**TINY, **VARIANTS[name])
    images = jax.random.normal(key, (3, 8, 12, 2))
    params = nn.unbox(model.init(key, images))["params"]
    params["head"]["kernel"] += 1.0  # Its zeros would hide all others.

    def loss(p):
        logits = model.apply({"params": p}, images)
        assert logits.shape == (3, 5) and logits.dtype == jnp.float32
        return jax.nn.logsumexp(logits * jnp.arange(5.0)[None])

    grads = jax.jit(jax.grad(loss))(params)
    dead = [p for p, g in jax.tree.leaves_with_path(grads) if not jnp.abs(g).max() > 0]
    # A key's bias moves all logits of a row alike, which the softmax does not see.
    dead = [p for p in dead if [k.key for k in p][-2:] != ["key", "bias"]]
    assert not dead


def test_without_classes_it_gives_features(key):
    model = ViT(**TINY | {"num_classes": 0})
    images = jax.random.normal(key, (3, 8, 8, 1))
    assert model.init_with_output(key, images)[0].shape == (3, 24)


@pytest.mark.parametrize("positions", ["learned", "sincos", "rotary"])
def test_patches_know_where_they_are(positions, key):
    model = ViT(**TINY | {"num_classes": 0}, positions=positions, pool="gap")
    images = jax.random.normal(key, (1, 8, 8, 1))
    params = nn.unbox(model.init(key, images))["params"]
    turned = jnp.flip(images.reshape(1, 2, 4, 8, 1), axis=1).reshape(images.shape)
    a, b = (model.apply({"params": params}, x) for x in (images, turned))
    assert abs(a - b).max() > 1e-4


def test_rotary_does_not_turn_the_class_token_and_registers(key):
    model = ViT(**TINY, positions="rotary", registers=2)
    seen = {}
    images = jax.random.normal(key, (1, 8, 8, 1))
    real = vit.Stack.__call__

    def spy(self, x, *, train, angles):
        seen["angles"] = angles
        return real(self, x, train=train, angles=angles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit.Stack, "__call__", spy)
        model.init(key, images)
    assert (seen["angles"][0, :3] == 0).all() and (seen["angles"][0, 4:] != 0).any()


def test_flops_are_what_the_compiler_counts():
    model = ViT(**TINY | {"depth": 1, "width": 48, "mlp_dim": 192})
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    counted = jax.jit(model.apply).lower(params, images).compile().cost_analysis()["flops"]
    assert 0.8 < flops(model, (32, 32, 3)) / counted < 1.0


def test_works_through_the_nnx_bridge(key):
    from flax import nnx

    images = jax.random.normal(key, (1, 8, 8, 1))
    model = ViT(**TINY)
    with nnx.use_eager_sharding(False):  # Logical axes are no mesh's.
        bridged = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(images)
    params = nnx.to_pure_dict(nnx.state(bridged, nnx.Param))
    expected = model.apply({"params": params}, images)
    np.testing.assert_allclose(bridged(images), expected, atol=1e-6)


def test_learned_positions_follow_the_size_of_the_image(key):
    """As torch resizes them: the class token keeps its own, equal grids are untouched."""
    model = ViT(**TINY, size=(8, 12))
    params = nn.unbox(model.init(key, jnp.zeros((1, 8, 12, 3))))["params"]
    position = params["embed"]["position"]["embedding"]
    assert position.shape == (1 + 2 * 3, 24)
    grid = model.parts().embed.position
    with jax.numpy_rank_promotion("allow"):
        same, other = (
            grid.apply({"params": {"embedding": position}}, *s) for s in [(2, 3), (4, 5)]
        )
    np.testing.assert_array_equal(same, position)
    np.testing.assert_array_equal(other[0], position[0])
    assert other.shape == (21, 24)
    images = jax.random.normal(key, (1, 16, 20, 3))
    assert jnp.isfinite(model.apply({"params": params}, images)).all()


def test_parts_are_the_model(key):
    model = ViT(**TINY, pool="map", registers=2)
    images = jax.random.normal(key, (2, 8, 8, 3))
    v = model.init(key, images)
    np.testing.assert_array_equal(model.apply(v, images), model.parts().apply(v, images))
    assert model.apply(v, images, method="features").shape == (2, 24)


def test_the_class_token_of_tok_has_no_position():
    cls, tok = (shapes(ViT(**TINY, pool=pool), 8)["embed"] for pool in ("cls", "tok"))
    assert cls["cls"] == tok["cls"]
    assert cls["position"]["embedding"].shape == (5, 24)
    assert tok["position"]["embedding"].shape == (4, 24)


@pytest.mark.parametrize(
    "options", [{}, {"registers": 2, "positions": "rotary", "qk_norm": True}], ids=str
)
def test_attention_maps_are_what_their_layer_does(options, key):
    """They sum to 1, and the values that they weigh are what attention gives."""
    model = ViT(**TINY, **options)
    images = jax.random.normal(key, (2, 8, 12, 3))
    params = nn.unbox(jax.jit(model.init)(key, images))["params"]
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(key, x.shape), params)
    stack, variables = model.parts().stack, {"params": params}
    tokens = model.parts().embed.apply({"params": params["embed"]}, images)
    layers = [jax.tree.map(lambda x, i=i: x[i], params["stack"]["block"]) for i in range(2)]
    x = stack.block.apply({"params": layers[0]}, tokens.x, **tokens.block)
    x = LayerNorm().apply({"params": layers[1]["attention_norm"]}, x)
    own = layers[1]["attention"]
    expected = stack.block.attention.apply({"params": own}, x, **tokens.block)

    maps = jax.jit(attention_map, static_argnums=0)(model, variables, images)
    assert maps.shape == (2, 3, x.shape[1], x.shape[1]) and maps.dtype == jnp.float32
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)
    v = jnp.einsum("BSD,DNH->BSNH", x, own["value"]["kernel"])
    v += own["value"]["bias"][None, None]
    y = jnp.einsum("BNTS,BSNH,NHD->BTD", maps, v, own["out"]["kernel"])
    y += own["out"]["bias"][None, None]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    first = attention_map(model, variables, images, layer=0)
    assert abs(first - maps).max() > 1e-2
    np.testing.assert_array_equal(first, attention_map(model, variables, images, layer=-2))


def test_a_map_of_no_layer_is_told(key):
    model = ViT(**TINY)
    v = jax.jit(model.init)(key, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="layer=2 is not one of 2; the last is -1"):
        attention_map(model, v, jnp.zeros((1, 8, 8, 3)), layer=2)
    with pytest.raises(ValueError, match="Bare has no stack of blocks with attention"):
        attention_map(Bare(), {}, jnp.zeros((1, 8, 8, 3)))


class Bare(nn.Module):
    """Encodes without attention."""

    def encode(self, images):
        return images


def test_an_image_of_other_channels_is_told():
    embed = dataclasses.replace(ViT(**TINY).parts().embed, channels=3)
    with pytest.raises(ValueError, match="images have 4 channels; the model takes 3"):
        embed.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)))
