from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.norm import RMSNorm
from jaxformer.models.dit import SIZES, DiT, flops, named
from jaxformer.ops.timestep import steps

# The original's, less its positions, which are no parameters here; and its published
# multiply-adds of one image in units of 10^9, for latents of 32 x 32 x 4.
COUNTS = {
    "S/2": (32_865_056, 6.06),
    "S/4": (32_920_448, 1.41),
    "S/8": (33_142_016, 0.36),
    "B/2": (130_315_808, 23.01),
    "B/4": (130_426_496, 5.56),
    "B/8": (130_869_248, 1.42),
    "L/2": (457_840_672, 80.71),
    "L/4": (457_988_224, 19.70),
    "L/8": (458_578_432, 5.01),
    "XL/2": (674_834_720, 118.64),
    "XL/4": (675_000_704, 29.05),
    "XL/8": (675_664_640, 7.39),
}
TINY: dict[str, Any] = {
    "width": 24,
    "depth": 2,
    "num_heads": 3,
    "patch": 2,
    "channels": 3,
    "num_classes": 5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "DiT": {"learned_variance": True},
    "LightningDiT": {"norm": RMSNorm, "gated": True, "rotary": True, "qk_norm": True},
    "JiT": {
        "norm": RMSNorm,
        "gated": True,
        "rotary": True,
        "qk_norm": True,
        "bottleneck": 7,
        "context": 3,
        "context_from": 1,
    },
    "in context": {"adaptive": False, "context": 1},
}


def noisy(key, rows=8, columns=12, channels=3):
    x = jax.random.normal(key, (4, rows, columns, channels))
    return x, jnp.array([0.0, 0.25, 0.777, 1.0]), jnp.array([0, 4, 2, 5])


def shapes(model, *inputs):
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]


def moved(params, key, by=0.1):
    """Parameters that are no longer zero anywhere."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    new = [x + by * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, new)


def made(key, **fields):
    """A model, its parameters as they start, and inputs."""
    model, inputs = DiT(**TINY, **fields), noisy(key)
    return model, nn.unbox(jax.jit(model.init)(key, *inputs))["params"], inputs


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_flops_are_the_originals(name):
    count, giga = COUNTS[name]
    model = named(name, learned_variance=True)
    given = shapes(model, jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, int))
    assert sum(x.size for x in jax.tree.leaves(given)) == count
    assert flops(model) / 2e9 == pytest.approx(giga, abs=0.025)


def test_no_named_size_is_untested():
    assert {name.split("/")[0] for name in COUNTS} == set(SIZES)


def test_a_name_that_is_none_lists_those_that_are():
    with pytest.raises(ValueError, match=r"'G/2' is no DiT; .*S, B, L, XL"):
        named("G/2")


def test_the_parameter_tree_is_a_public_format():
    model = DiT(**TINY)
    tree = shapes(model, *noisy(jax.random.key(0)))
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(tree)}
    block = "stack/block/"
    linear = [f"{block}attention/{n}" for n in ("query", "key", "value", "out")]
    linear += [f"{block}{n}" for n in ("mlp/up", "mlp/down", "modulation/linear")]
    linear += ["embed/patch", "condition/time/up", "condition/time/down"]
    linear += ["norm/modulation/linear", "head"]
    expected = {f"{n}/{leaf}" for n in linear for leaf in ("kernel", "bias")}
    assert paths == expected | {"condition/label/embedding"}


SLOW = ("LightningDiT", "JiT", "in context")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in VARIANTS]
)
def test_every_variant_starts_at_zero_and_learns_from_every_parameter(name, key):
    model, params, inputs = made(key, **VARIANTS[name])

    def out(params) -> Any:
        return model.apply({"params": params}, *inputs)

    run = jax.jit(jax.value_and_grad(lambda params: (out(params) ** 2).sum()))

    channels = 6 if "learned_variance" in VARIANTS[name] else 3
    assert jax.eval_shape(out, params).shape == (4, 8, 12, channels)
    assert run(params)[0] == 0
    value, grads = run(moved(params, key))
    assert value > 0
    for path, grad in jax.tree.leaves_with_path(grads):
        if "key" not in str(path) or "bias" not in str(path):  # A softmax sees no constant.
            assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)


def test_every_block_is_the_identity_at_first(key):
    model, params, (x, t, label) = made(key)

    @jax.jit
    def tokens(params):
        denoiser = model.parts()
        before = denoiser.bind({"params": params}).embed(x).x
        return before, model.apply({"params": params}, x, t, label, method="encode")

    before, after = tokens(params)
    np.testing.assert_array_equal(before, after)
    before, after = tokens(moved(params, key))
    assert np.abs(before - after).max() > 0.1


def test_no_label_is_the_last_row_and_so_is_one_that_is_dropped(key):
    model, params, (x, t, label) = made(key, label_dropout=0.9999)
    params = moved(params, key)

    @jax.jit
    def run(label, key):
        given = {"params": params}
        return (
            model.apply(given, x, t, label),
            model.apply(given, x, t, label, train=True, rngs={"dropout": key}),
            model.apply(given, x, t),
        )

    kept, dropped, none = run(label, key)
    np.testing.assert_allclose(dropped, none, rtol=0, atol=2e-6)
    same = kept[3], none[3]  # Its label is that of no class.
    np.testing.assert_allclose(*same, rtol=0, atol=2e-6)
    assert np.abs(kept[:3] - none[:3]).max() > 1e-3
    outside = run(jnp.array([0, 6, -1, 5]), key)[0]
    assert np.isnan(outside[1:3]).all()
    np.testing.assert_array_equal(outside[0], kept[0])


def test_patches_go_back_where_they_came_from(key):
    model, params, (x, t, label) = made(key)
    params["head"]["bias"] = jnp.arange(12.0)  # Rows, then columns, then channels.
    out = jax.jit(model.apply)({"params": params}, x, t, label)
    patch = np.arange(12.0).reshape(2, 2, 3)
    np.testing.assert_array_equal(out, np.tile(patch, (4, 4, 6, 1)))


def test_a_step_of_a_thousand_is_a_whole_number_to_the_model():
    t = jnp.asarray(np.arange(1001) / 1000, jnp.float32)
    assert (t * 1000 != jnp.round(t * 1000)).any()  # Such as 511.
    np.testing.assert_array_equal(steps(t, 1e3), np.arange(1001))
    assert steps(jnp.float32(0.51151), 1e3) == np.float32(511.51)
    slope = jax.jvp(lambda t: steps(t, 1e3), (t,), (jnp.ones_like(t),))[1]
    np.testing.assert_array_equal(slope, 1e3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide width=24"),
        ({"adaptive": False}, "needs context=1 or more"),
        ({"adaptive": False, "context": 1, "context_from": 1}, "needs context_from=0"),
        ({"context": 1, "context_from": 2}, "context_from=2 must be a layer, below depth=2"),
    ],
)
def test_numbers_that_make_no_model_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DiT(**{**TINY, **fields}).parts()


def test_latents_of_another_depth_are_refused(key):
    with pytest.raises(ValueError, match="images have 4 channels; the model takes 3"):
        shapes(DiT(**TINY), *noisy(key, channels=4))


def test_bfloat16_gives_float32(key):
    model, inputs = DiT(**TINY, dtype=jnp.bfloat16), noisy(key)
    params = shapes(model, *inputs)
    out = jax.eval_shape(lambda p: model.apply({"params": p}, *inputs), params)
    assert out.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
