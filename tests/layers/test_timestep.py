import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Mlp, Stack
from jaxformer.layers.norm import BareLayerNorm, RMSNorm
from jaxformer.layers.timestep import AdaBlock, AdaNorm, TimestepEmbed
from jaxformer.ops.timestep import cosines_first, sines_first
from tests.layers.test_block import randomized

F32 = {"dtype": jnp.float32}
# Of diffusers' get_timestep_embedding(t, 8), by (flip_sin_to_cos, downscale_freq_shift).
GOLDEN = {
    cosines_first: """
        1 1 1 1 0 0 0 0
        0.9323273 0.9993156 0.9999931 0.9999999 0.3616154 0.0369916 0.0037 0.00037
        -0.551389 0.9768724 0.2884533 0.8773428 -0.8342483 -0.2138232 -0.957494 0.4798642
        0.5623791 0.8623151 -0.8390715 0.5403023 0.8268796 -0.5063722 -0.5440211 0.841471
    """,  # (True, 0): DiT's.
    sines_first: """
        0 0 0 0 1 1 1 1
        0.3616154 0.017173 0.0007971 0.000037 0.9323273 0.9998525 0.9999997 1
        -0.8342483 -0.9457856 0.8811527 0.0500291 -0.551389 -0.3247916 0.4728317 0.9987478
        0.8268796 0.6503158 0.8344632 0.0998334 0.5623791 -0.759664 -0.5510637 0.9950042
    """,  # (False, 1): MD4's.
}


@pytest.mark.parametrize("features", GOLDEN, ids=lambda f: f.__name__)
def test_features_of_times_are_the_originals(features):
    t = jnp.array([0.0, 0.37, 500.5, 1000.0])
    golden = np.array(GOLDEN[features].split(), float).reshape(4, 8)
    np.testing.assert_allclose(features(t, 8), golden, atol=6e-5)
    np.testing.assert_array_equal(features(t[None], 8), features(t, 8)[None])
    with pytest.raises(ValueError, match="size=7 must be even"):
        features(t, 7)


def test_times_are_scaled_to_steps(key):
    """Of 1000; a model that counts its own steps has scale=1."""
    t = jnp.array([[0.0, 0.25, 1.0]])
    layer = TimestepEmbed(6, 8)
    params = randomized(jax.jit(layer.init)(key, t), key)
    y = layer.apply({"params": params}, t)
    counted = layer.clone(scale=1.0).apply({"params": params}, jnp.array([0, 250, 1000]))
    np.testing.assert_allclose(y[0], counted, rtol=1e-6)
    x = cosines_first(t * 1000, 8)
    up, down = params["up"], params["down"]
    expected = nn.silu(x @ up["kernel"] + up["bias"][None, None])
    expected = expected @ down["kernel"] + down["bias"][None, None]
    np.testing.assert_allclose(y, expected, atol=1e-5)


def block(**fields):
    return AdaBlock(Attention(2, 4, **F32), Mlp(12, **F32), **fields)


def test_a_new_block_is_the_identity(key):
    """And its gates have gradients all the same; so has a norm nothing of the condition."""
    x, c = jax.random.normal(key, (2, 5, 8)), jax.random.normal(key, (2, 1, 6))
    stack = Stack(block(), 3)
    params = nn.unbox(jax.jit(stack.init)(key, x, condition=c))["params"]
    assert {p.shape for p in jax.tree.leaves(params["block"]["modulation"])} == {
        (3, 6, 6, 8),
        (3, 6, 8),
    }

    def loss(params):
        y = stack.apply({"params": params}, x, condition=c)
        return jnp.square(y).sum(), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal(y, x)
    moved = np.abs(gradient["block"]["modulation"]["linear"]["kernel"]).max((0, 1, 3)) > 0
    np.testing.assert_array_equal(moved, [False, False, True] * 2)  # The gates alone.
    last = AdaNorm(BareLayerNorm())
    v = last.init(key, x, c)
    np.testing.assert_array_equal(last.apply(v, x, c), BareLayerNorm().apply({}, x))


@pytest.mark.parametrize("tokens", [1, 5], ids=["a row's condition", "a token's"])
def test_a_block_is_its_equations(tokens, key):
    """In DiT's order: shift, scale, gate of attention, then of the MLP; SiLU before all."""
    x, c = jax.random.normal(key, (2, 5, 8)), jax.random.normal(key, (2, tokens, 6))
    layer = block(epsilon=1e-3)
    params = randomized(jax.jit(layer.init)(key, x, condition=c), key)
    p = params["modulation"]["linear"]
    made = jnp.einsum("BSC,CPD->PBSD", nn.silu(c), p["kernel"]) + p["bias"][:, None, None]

    def normed(x):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)

    def apply(part, name, x):
        return jax.jit(part.apply)({"params": params[name]}, x)

    y = x + made[2] * apply(layer.attention, "attention", normed(x) * (1 + made[1]) + made[0])
    y = y + made[5] * apply(layer.mlp, "mlp", normed(y) * (1 + made[4]) + made[3])
    found = jax.jit(layer.apply)({"params": params}, x, condition=c)
    np.testing.assert_allclose(found, y, atol=2e-5)


def test_a_block_runs_in_its_dtype(key):
    x = jnp.ones((1, 3, 8), jnp.bfloat16)
    c = jax.random.normal(key, (1, 1, 6))
    layer = AdaBlock(Attention(2, 4), Mlp(12), RMSNorm)
    y, v = jax.jit(layer.init_with_output)(key, x, condition=c)
    assert y.dtype == jnp.bfloat16
    chex.assert_tree_all_finite(v)
    assert set(nn.unbox(v)["params"]) == {
        "attention",
        "attention_norm",
        "mlp",
        "mlp_norm",
        "modulation",
    }
