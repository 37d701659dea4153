import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import convert
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention
from jaxformer.models.video import SIZES, TimeAttention, ViViT, flops, named
from jaxformer.ops.patches import sincos_1d, tubelets

# Of 32 frames of 224 pixels and 400 classes. Those of B are the paper's, table 2, in 10^6:
# 88.9 (which is cut, not rounded), 115.1 and 117.3; all joint ones are transformers'.
JOINT = {"positions": "joint", "pool": "cls"}
COUNTS = {
    "B/16x2": (JOINT, 88_954_000),
    "B/16x2 model 2": ({"attention": "encoders", "pool": "cls"}, 115_061_392),
    "B/16x2 model 3": ({"attention": "blocks", "positions": "joint"}, 117_319_312),
    "L/16x2": (JOINT, 307_508_624),
    "H/16x2": (JOINT, 636_177_040),
}
TINY = {"width": 24, "depth": 2, "mlp_dim": 40, "num_heads": 3, "patch": 4, "num_classes": 5}
VARIANTS = {
    "joint": {},
    "joint cls": JOINT,
    "joint sincos": {"positions": "sincos"},
    "encoders": {"attention": "encoders", "time_depth": 2},
    "encoders cls": {"attention": "encoders", "time_depth": 1, "pool": "cls"},
    "blocks": {"attention": "blocks"},
}


# Little is computed here, so that compiling is what takes time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)


def made(key, frames=6, **fields):
    model = ViViT(**TINY | {"size": (frames, 8, 12)} | fields)
    video = jax.random.normal(key, (2, frames, 8, 12, 1))
    shapes = nn.unbox(jax.eval_shape(model.init, key, video))["params"]
    draw = np.random.default_rng(0)

    def random(path, x):  # Every one, so that none hides; norms and biases are about 1 and 0.
        noise = 0.3 * draw.normal(size=x.shape).astype("float32")
        return jnp.asarray(noise + (path[-1].key == "scale"))

    return model, jax.tree.map_with_path(random, shapes), video


def positions(params, name):
    """The table of positions of "time" or "space", wherever it lies."""
    found = [
        (path, x) for path, x in jax.tree.leaves_with_path(params)
        if path[-2].key == name or (path[-2].key == "position" and name == "time")
    ]  # fmt: skip
    ((path, table),) = found
    return [k.key for k in path], table


def changed(params, path, table):
    copy = jax.tree.map(lambda x: x, params)
    node = copy
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = table
    return copy


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    fields, count = COUNTS[name]
    model, frames = named(name.split()[0], **fields), jnp.zeros((1, 32, 224, 224, 3))
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), frames))
    assert sum(p.size for p in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("name", ["joint cls", "encoders cls", "blocks"])
def test_flops_are_what_xla_counts(name):
    model = ViViT(**{**TINY, "width": 48, "mlp_dim": 192, "depth": 1, **VARIANTS[name]})
    model = dataclasses.replace(model, time_depth=1)
    frames = jax.ShapeDtypeStruct((1, 8, 16, 24, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), frames)
    counted = jax.jit(model.apply).lower(params, frames).cost_analysis()["flops"]
    assert 0.8 < flops(model, (8, 16, 24, 3)) / counted < 1.0


def test_no_named_size_is_untested():
    assert {name.split("/")[0] for name in COUNTS} == set(SIZES)
    with pytest.raises(ValueError, match="'B/16' is no ViViT; write SIZE/PATCHxFRAMES"):
        named("B/16")


def test_tubelets_are_blocks_of_the_video(key):
    video = jax.random.normal(key, (2, 4, 6, 9, 2))
    found = tubelets(video, 2, 3).reshape(2, 2, 2, 3, 2 * 3 * 3 * 2)
    for f, y, x in np.ndindex(2, 2, 3):
        block = video[:, 2 * f : 2 * f + 2, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3]
        np.testing.assert_array_equal(found[:, f, y, x], block.reshape(2, -1))
    with pytest.raises(ValueError, match="tubelet=3 must divide the video's 4 frames"):
        tubelets(video, 3, 3)


def test_positions_of_a_row_are_the_first_transformers():
    table = sincos_1d(7, 6)
    for t, i in np.ndindex(7, 3):
        turn = t / 10_000 ** (2 * i / 6)
        np.testing.assert_allclose(table[t, 2 * i : 2 * i + 2], [np.sin(turn), np.cos(turn)])
    with pytest.raises(ValueError, match="even width, got 5"):
        sincos_1d(7, 5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_from_every_parameter(name, key):
    model, params, video = made(key, **VARIANTS[name])

    def loss(p):
        logits = model.apply({"params": p}, video)
        assert logits.shape == (2, 5) and logits.dtype == jnp.float32
        return jax.nn.logsumexp(logits * jnp.arange(5.0)[None])

    grads = jit(jax.grad(loss))(params)
    dead = [p for p, g in jax.tree.leaves_with_path(grads) if not jnp.abs(g).max() > 1e-6]
    # A key's bias moves all logits of a row alike, which the softmax does not see.
    assert not [p for p in dead if [k.key for k in p][-2:] != ["key", "bias"]]


def test_a_position_is_that_of_its_time_and_that_of_its_place(key):
    model, params, video = made(key)
    embed = model.parts().embed
    position = params["embed"]["position"]
    time, space = position["time"]["embedding"], position["space"]["embedding"]
    assert time.shape == (3, 24) and space.shape == (6, 24)
    tokens = embed.apply({"params": params["embed"]}, 0 * video).x[0]
    tokens -= params["embed"]["patch"]["bias"][None]
    for t, s in np.ndindex(3, 6):
        np.testing.assert_allclose(tokens[6 * t + s], time[t] + space[s], atol=1e-6)


@pytest.mark.parametrize("name", ["joint", "encoders", "blocks"])
def test_time_is_known_by_its_table_alone(name, key):
    """Tubelets in another order, with their positions, are the same video."""
    model, params, video = made(key, **VARIANTS[name])
    path, table = positions(params, "time")
    order = jnp.array([2, 0, 1])
    moved = video.reshape(2, 3, 2, *video.shape[2:])[:, order].reshape(video.shape)
    same = model.apply({"params": params}, video)
    other = model.apply({"params": params}, moved)
    assert abs(other - same).max() > 1e-3
    again = model.apply({"params": changed(params, path, table[order])}, moved)
    np.testing.assert_allclose(again, same, atol=1e-4)


@pytest.mark.parametrize("name", ["encoders", "blocks"])
def test_without_a_table_of_time_a_still_video_is_an_image(name, key):
    model, params, video = made(key, **VARIANTS[name])
    path, table = positions(params, "time")
    params = changed(params, path, 0 * table)
    image = video[:, :1]
    short, long = (
        model.apply({"params": params}, jnp.tile(image, (1, n, 1, 1, 1))) for n in (2, 6)
    )
    np.testing.assert_allclose(short, long, atol=1e-4)


def test_without_attention_in_time_it_is_the_mean_of_its_times(key):
    model, params, video = made(key, attention="blocks", num_classes=0)
    path, table = positions(params, "time")
    params = changed(params, path, 0 * table)
    out = params["stack"]["block"]["time"]["out"]
    params["stack"]["block"]["time"]["out"] = jax.tree.map(jnp.zeros_like, out)
    times = [model.apply({"params": params}, video[:, i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose(
        model.apply({"params": params}, video), sum(times) / 3, atol=1e-5
    )


def test_an_encoder_of_time_sees_the_features_of_each_time(key):
    model, params, video = made(key, attention="encoders", time_depth=1)
    whole = model.parts()
    space = whole.embed.space
    features = jnp.stack(
        [
            space.apply(
                {"params": params["embed"]["space"]}, video[:, i : i + 2], method="features"
            )
            for i in (0, 2, 4)
        ],
        1,
    )
    tokens = whole.embed.apply({"params": params["embed"]}, video).x
    table = params["embed"]["position"]["embedding"]
    np.testing.assert_allclose(tokens, features + table[None], atol=1e-6)


def test_attention_in_time_is_that_of_each_place(key):
    numbers = {"num_heads": 2, "head_dim": 4, "dtype": jnp.float32}
    x = jax.random.normal(key, (2, 3, 5, 8))
    layer = TimeAttention(**numbers)
    variables = layer.init(key, x.reshape(2, 15, 8), times=3)
    y = layer.apply(variables, x.reshape(2, 15, 8), times=3).reshape(x.shape)
    for place in range(5):
        expected = Attention(**numbers).apply(variables, x[:, :, place])
        np.testing.assert_allclose(y[:, :, place], expected, atol=1e-6)


def test_a_longer_and_larger_video_has_positions_too(key):
    model, params, _ = made(key)
    video = jax.random.normal(key, (1, 10, 16, 20, 1))
    assert jnp.isfinite(model.apply({"params": params}, video)).all()
    joint, params, _ = made(key, **JOINT)
    with pytest.raises(ValueError, match=r"of \(3, 2, 3\) tubelets, the video has \(5, 4, 5\)"):
        joint.apply({"params": params}, video)


def test_numbers_that_do_not_go_together_are_told(key):
    for fields, error in (
        ({"attention": "blocks", "pool": "cls"}, "has no class token; use pool='gap'"),
        ({"attention": "encoders", "positions": "joint"}, "'factored' or 'sincos'"),
        ({"num_heads": 5}, "num_heads=5 must divide width=24"),
    ):
        with pytest.raises(ValueError, match=error):
            ViViT(**TINY | fields).parts()
    embed = dataclasses.replace(ViViT(**TINY).parts().embed, channels=3)
    with pytest.raises(ValueError, match="videos have 1 channels; the model takes 3"):
        embed.init(key, jnp.zeros((1, 2, 8, 8, 1)))


def test_what_is_trained_here_is_saved_for_transformers(key, tmp_path):
    model, params, video = made(key, channels=1, **JOINT)
    convert.save(tmp_path, model.parts(), params)
    again, found = convert.load(tmp_path)
    np.testing.assert_array_equal(
        again.apply({"params": found}, video), model.apply({"params": params}, video)
    )
    config = (tmp_path / "config.json").read_text()
    assert '"model_type": "vivit"' in config
    (tmp_path / "config.json").write_text(config.replace('"num_frames": 6', '"num_frames": 5'))
    with pytest.raises(
        InputError, match=r"must divide num_frames and image_size, \(5, 8, 12\)"
    ):
        convert.load(tmp_path)
    with pytest.raises(InputError, match="no family can hold"):
        convert.save(tmp_path, made(key)[0].parts(), made(key)[1])
