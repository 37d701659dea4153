import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxformer import convert
from jaxformer.layers.embed import FixedPosition
from jaxformer.models.mae import MAE, SIZES, flops, masking, named
from jaxformer.models.vit import Size
from jaxformer.objectives.reconstruct import Reconstruct
from jaxformer.ops.patches import sincos_2d
from jaxformer.optim import AdamW, Constant

# With the positions, which are not learned: what transformers counts of facebook/vit-mae-*.
COUNTS = {"B/16": 111_907_840, "L/16": 329_541_888, "H/14": 657_074_508}
TINY = MAE(Size(24, 2, 40, 3), 4, Size(16, 1, 20, 2), size=(8, 16), channels=1)

# Little is computed here, so that compiling is what takes time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)


def example(key, model=TINY):
    images = jax.random.normal(key, (3, 8, 16, 1))
    noise = jax.random.uniform(jax.random.fold_in(key, 1), (3, 8))
    return nn.unbox(jit(model.init)(key, images)), images, noise


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = nn.unbox(jax.eval_shape(named(name).init, jax.random.key(0), images))
    assert sum(p.size for p in jax.tree.leaves(shapes)) == COUNTS[name]


def test_no_named_size_is_untested():
    assert {name.split("/")[0] for name in COUNTS} == set(SIZES)
    with pytest.raises(ValueError, match=r"'S/16' is no MAE; .*B, L, H"):
        named("S/16")


def test_masking_is_its_definition(key):
    noise = jax.random.uniform(key, (4, 10))
    kept, restore, mask = masking(noise, 0.7)
    for b in range(4):
        order = sorted(range(10), key=lambda t: noise[b, t])
        assert list(kept[b]) == order[:3]
        assert [order[i] for i in restore[b]] == list(range(10))
        assert [float(t not in order[:3]) for t in range(10)] == list(mask[b])
    with pytest.raises(ValueError, match=r"ratio=1\.0 must be at least 0 and less than 1"):
        masking(noise, 1.0)


def test_what_is_hidden_is_not_seen(key):
    variables, images, noise = example(key)

    def drawn(images):
        return TINY.apply(variables, images, noise)[0].sum()

    seen = jit(jax.grad(drawn))(images).reshape(3, 2, 4, 4, 4, 1).swapaxes(2, 3)
    seen = jnp.abs(seen).max((3, 4, 5)).reshape(3, 8) > 0
    np.testing.assert_array_equal(seen, TINY.apply(variables, images, noise)[1] == 0)
    assert seen.sum() == 3 * 2


def test_without_noise_all_is_shown(key):
    variables, images, _ = example(key)
    pixels, mask = TINY.apply(variables, images)
    assert pixels.shape == (3, 8, 16) and not mask.any()
    tokens = TINY.apply(variables, images, method="encode")
    np.testing.assert_array_equal(
        TINY.apply(variables, images, method="features"), tokens[:, 0]
    )
    gap = MAE(TINY.encoder, 4, TINY.decoder, size=(8, 16), pool="gap")
    np.testing.assert_allclose(
        gap.apply(variables, images, method="features"), tokens[:, 1:].mean(1), atol=1e-6
    )


def test_the_encoder_computes_the_shown_patches_alone(key):
    variables, images, noise = example(key)
    assert TINY.apply(variables, images, noise, method="encode").shape == (3, 1 + 2, 24)
    with pytest.raises(ValueError, match=r"noise has shape \(3, 7\) and must be \(3, 8\)"):
        TINY.apply(variables, images, noise[:, :7])


def test_it_learns_by_reconstruction_all_but_its_positions(key):
    objective = Reconstruct(4)
    objective.check(TINY, None)
    variables, images, noise = example(key)
    params, batch = variables["params"], {"image": images, "noise": noise}

    def loss(p):
        return objective.loss(TINY.apply, p, batch, key)[0]

    value, grads = jit(jax.value_and_grad(loss))(params)
    assert jnp.isfinite(value)
    dead = {
        "/".join(k.key for k in path)
        for path, g in jax.tree.leaves_with_path(grads)
        if not jnp.abs(g).max() > 1e-9
    }
    dead -= {f"{part}/stack/block/attention/key/bias" for part in ("encoder", "decoder")}
    assert dead == {"encoder/embed/position/bias", "decoder/position/bias"}
    axes = jax.tree.map(lambda _: None, params)
    tx = AdamW(Constant(0.1), decay=0.5).make(axes, steps=10)
    updates, _ = jit(lambda g, p: tx.update(g, tx.init(p), p))(grads, params)
    assert not updates["decoder"]["position"]["bias"].any()
    assert updates["decoder"]["mask"]["embedding"].any()


def test_fixed_positions_are_maes(key):
    position = FixedPosition(24, prefix=1)
    table = nn.unbox(position.init(key, 2, 3))["params"]["bias"]
    np.testing.assert_array_equal(table[0], 0)
    np.testing.assert_array_equal(table[1:], sincos_2d(2, 3, 24, endpoint=False))


def test_what_is_trained_here_is_saved_for_transformers(key, tmp_path):
    variables, *_ = example(key)
    convert.save(tmp_path, TINY.parts(), variables["params"])
    model, params = convert.load(tmp_path)
    assert model == TINY.parts()
    jax.tree.map(np.testing.assert_array_equal, params, variables["params"])


def test_names_of_transformers_5_are_read(key, tmp_path):
    """Those it has in memory, and those it writes, which are neither the hub's."""
    variables, *_ = example(key)
    convert.save(tmp_path, TINY.parts(), variables["params"])
    path = tmp_path / "model.safetensors"
    hub = safetensors.numpy.load_file(path)
    memory = {"encoder.layer.": "layers.", "attention.attention.query": "attention.q_proj"}
    memory |= {"attention.attention.key": "attention.k_proj"}
    memory |= {"attention.attention.value": "attention.v_proj"}
    memory |= {"attention.output.dense": "attention.o_proj"}
    memory |= {"intermediate.dense": "mlp.fc1", r"(\d)\.output.dense": r"\1.mlp.fc2"}
    for renames in (memory, {"decoder_layers": "decoder_encoder.layer"}):
        written = hub
        for old, new in renames.items():
            written = {re.sub(old, new, name): x for name, x in written.items()}
        assert written.keys() != hub.keys()
        safetensors.numpy.save_file(written, path)
        _, params = convert.load(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, params, variables["params"])


def test_flops_are_what_the_compiler_counts():
    model = MAE(Size(48, 1, 192, 3), 4, Size(32, 1, 128, 2))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    noise = jax.ShapeDtypeStruct((1, 64), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    run = jax.jit(model.apply).lower(params, images, noise).compile()
    counted = run.cost_analysis()["flops"]
    assert 0.8 < flops(model, (32, 32, 3)) / counted < 1.0
