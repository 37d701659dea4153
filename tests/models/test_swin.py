import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxformer import convert
from jaxformer.convert.swin import SWIN
from jaxformer.errors import InputError
from jaxformer.models.swin import (
    SIZES,
    Merge,
    Swin,
    WindowAttention,
    drop_paths,
    flops,
    named,
)

# At 224 pixels and 1,000 classes, as published: parameters, and 10^9 multiply-adds.
COUNTS = {
    "T": (28_288_354, 4.5),
    "S": (49_606_258, 8.7),
    "B": (87_768_224, 15.4),
    "L": (196_532_476, 34.5),
}
TINY = Swin(6, (2, 2), (2, 3), patch=2, window=3, num_classes=5, size=(14, 18), channels=1)
# Little is computed here, so that compiling is what takes time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)
F32 = {"use_bias": True, "dtype": jnp.float32}


def randomised(model, *inputs):
    """Every parameter away from what it begins with; norms are about 1."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    draw = np.random.default_rng(0)

    def random(path, x):
        noise = 0.3 * draw.normal(size=x.shape).astype("float32")
        return jnp.asarray(noise + (path[-1].key == "scale"))

    return jax.tree.map_with_path(random, shapes)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_and_flops(name):
    model, images = named(name), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))
    assert sum(p.size for p in jax.tree.leaves(shapes)) == COUNTS[name][0]
    assert round(flops(model) / 2e9, 1) == COUNTS[name][1]


def test_no_named_size_is_untested():
    assert set(COUNTS) == set(SIZES)
    with pytest.raises(ValueError, match="'H' is no Swin; write one of T, S, B, L"):
        named("H")


@pytest.mark.parametrize("shift", [0, 1])
def test_windows_are_a_mask_of_the_whole_grid(shift, key):
    """Written without windows: every token of the grid beside every other."""
    w, grid, N, H = 3, (6, 9), 2, 4
    layer = WindowAttention(N, H, window=w, shift=shift, **F32)
    x = jax.random.normal(key, (2, 54, 10))
    params = nn.unbox(layer.init(key, x, grid=grid))["params"]
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(key, p.shape), params)

    places = np.stack(np.mgrid[:6, :9]).reshape(2, -1)
    moved = (places - shift) % np.array(grid)[:, None]
    here, there = moved[:, :, None], moved[:, None, :]
    around = (places < shift)[:, :, None] != (places < shift)[:, None, :]
    seen = ((here // w == there // w) & ~around).all(0)
    rows, columns = np.clip(here - there + w - 1, 0, 2 * w - 2)
    bias = params["bias"][rows * (2 * w - 1) + columns]

    def project(name):
        p = params[name]
        return jnp.einsum("btd,dnh->btnh", x, p["kernel"]) + p["bias"][None, None]

    logits = jnp.einsum("btnh,bsnh->bnts", project("query"), project("key")) / np.sqrt(H)
    logits = jnp.where(seen[None, None], logits + bias.transpose(2, 0, 1)[None], -jnp.inf)
    y = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits, -1), project("value"))
    y = jnp.einsum("btnh,nhd->btd", y, params["out"]["kernel"])
    y += params["out"]["bias"][None, None]
    np.testing.assert_allclose(layer.apply({"params": params}, x, grid=grid), y, atol=2e-6)


def test_a_grid_of_one_window_is_not_shifted(key):
    x = jax.random.normal(key, (1, 9, 8))
    plain, shifted = (WindowAttention(2, 4, window=3, shift=s, **F32) for s in (0, 1))
    variables = plain.init(key, x, grid=(3, 3))
    np.testing.assert_array_equal(
        plain.apply(variables, x, grid=(3, 3)), shifted.apply(variables, x, grid=(3, 3))
    )


def test_merging_lays_four_side_by_side(key):
    x = jax.random.normal(key, (1, 6, 4))  # A grid of 3 x 2, filled up to 4 x 2.
    merge = Merge()
    variables = nn.unbox(merge.init(key, x, (3, 2)))
    y, grid = merge.apply(variables, x, (3, 2))
    assert grid == (2, 1) and y.shape == (1, 2, 8)
    zeros = jnp.zeros(8)
    four = jnp.stack(
        [
            jnp.concatenate([x[0, 0], x[0, 2], x[0, 1], x[0, 3]]),
            jnp.concatenate([x[0, 4], zeros[:4], x[0, 5], zeros[:4]]),
        ]
    )
    four = (four - four.mean(1, keepdims=True)) / jnp.sqrt(four.var(1, keepdims=True) + 1e-5)
    kernel = variables["params"]["reduce"]["kernel"]
    np.testing.assert_allclose(y[0], four @ kernel, atol=1e-5)


def test_every_parameter_learns_at_any_size(key):
    images = jax.random.normal(key, (2, 13, 18, 1))
    params = randomised(TINY, images)

    def loss(p):
        logits = TINY.apply({"params": p}, images)
        assert logits.shape == (2, 5) and logits.dtype == jnp.float32
        return jax.nn.logsumexp(logits * jnp.arange(5.0)[None])

    grads = jit(jax.grad(loss))(params)
    dead = [p for p, g in jax.tree.leaves_with_path(grads) if not jnp.abs(g).max() > 1e-6]
    # A key's bias moves all logits of a row alike where nothing is filled up with 0.
    assert not [p for p in dead if [k.key for k in p][-2:] != ["key", "bias"]]
    for method, shape in (("features", (2, 12)), ("encode", (2, 4 * 5, 12))):
        run = functools.partial(TINY.apply, method=method)
        assert jax.eval_shape(run, {"params": params}, images).shape == shape


def test_drop_path_grows_over_all_stages(key):
    first, second = drop_paths((2, 4), 0.5)
    np.testing.assert_allclose(first, [(0, 0.1)])
    np.testing.assert_allclose(second, [(0.2, 0.3), (0.4, 0.5)])
    model = Swin(6, (2, 2), (2, 3), patch=2, window=3, num_classes=0, drop_path=0.9)
    images = jax.random.normal(key, (4, 12, 12, 1))
    variables = {"params": randomised(model, images)}
    run = jit(lambda k: model.apply(variables, images, train=True, rngs={"dropout": k}))
    runs = [run(k) for k in jax.random.split(key)]
    assert abs(runs[0] - runs[1]).max() > 1e-3
    still = TINY.parts().clone(stack=model.parts().stack)
    assert still.stack.stages[1].drop_path == ((pytest.approx(0.6), pytest.approx(0.9)),)


def test_numbers_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="its depth=3 must be even"):
        Swin(8, (2, 3), (2, 4)).parts()
    with pytest.raises(ValueError, match="num_heads=3 of stage 1 must divide its width 16"):
        Swin(8, (2, 2), (2, 3)).parts()
    with pytest.raises(ValueError, match="differ"):
        Swin(8, (2, 2), (2,)).parts()


def test_it_is_saved_and_read_under_the_names_of_transformers(key, tmp_path):
    images = jax.random.normal(key, (2, 14, 18, 1))
    params = randomised(TINY, images)
    convert.save(tmp_path, TINY.parts(), params)
    path = tmp_path / "model.safetensors"
    hub = safetensors.numpy.load_file(path)
    assert "swin.encoder.layers.1.blocks.0.attention.self.query.weight" in hub
    renames = {f"self.{a}": f"{a[0]}_proj" for a in ("query", "key", "value")}
    renames |= {"attention.output.dense": "attention.o_proj", "output.dense": "mlp.fc2"}
    renames |= {"intermediate.dense": "mlp.fc1"}
    renames |= {r"attention\.self\.rel": "attention.relative_position_bias.rel"}
    memory = hub
    for old, new in renames.items():
        memory = {re.sub(old, new, name): x for name, x in memory.items()}
    index = {
        f"swin.encoder.layers.{i}.blocks.0.attention.self.relative_position_index": np.zeros(
            (9, 9), np.int64
        )
        for i in range(2)
    }
    for tensors in (hub | index, memory):
        safetensors.numpy.save_file(tensors, path)
        _, found = convert.load(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"use_absolute_embeddings": True}, "use_absolute_embeddings must be false"),
        ({"depths": [2]}, r"depths=\[2\] must be even, and as many as num_heads=\[2, 3\]"),
        ({"depths": 2}, "depths=2 must be a list of numbers"),
        ({"drop_path_rate": 2}, "drop_path_rate=2 must be at least 0, below 1"),
        ({"num_heads": [2, 5]}, r"num_heads=\[2, 5\]: 5 must divide 12"),
    ],
)
def test_a_config_of_another_swin_is_refused(fields, error):
    config = SWIN.config(TINY.parts())
    assert config is not None
    assert SWIN.model(config, {"classifier.weight"}, jnp.float32) == TINY.parts()
    with pytest.raises(InputError, match=error):
        SWIN.model(config | fields, set(), jnp.float32)
