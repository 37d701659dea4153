import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, LayerScale, Mlp, Stack, drop_path
from jaxformer.layers.norm import LayerNorm, RMSNorm
from jaxformer.layers.pool import AttentionPool
from jaxformer.ops.activation import gelu, gelu_tanh, quick_gelu, silu
from jaxformer.ops.attention import attend
from jaxformer.ops.mask import Causal
from jaxformer.ops.rotary import angles

F32 = {"dtype": jnp.float32}


def randomized(variables, key):
    """Every parameter away from its initial value, so that none hides."""
    leaves, tree = jax.tree.flatten(nn.unbox(variables)["params"])
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(
        [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "qk_norm": RMSNorm, "use_bias": True}],
    ids=str,
)
def test_attention_equals_its_equations(options, key):
    x = jax.random.normal(key, (2, 6, 10))
    layer = Attention(4, 8, **options, **F32)
    p = randomized(layer.init(key, x), key)
    turn = angles(jnp.arange(6)[None], 8)

    def project(name, x):
        y = jnp.einsum("BTD,DNH->BTNH", x, p[name]["kernel"])
        return y + p[name]["bias"][None, None] if "bias" in p[name] else y

    def rotated(x):
        half = jnp.exp(1j * turn[:, :, None])
        z = (x[..., :4] + 1j * x[..., 4:]) * half
        return jnp.concatenate([z.real, z.imag], -1)

    def normed(name, x):
        if name not in p:
            return x
        rms = jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x / rms * p[name]["scale"][None, None, None]

    q = rotated(normed("query_norm", project("query", x)))
    k = rotated(normed("key_norm", project("key", x)))
    y = attend(q, k, project("value", x), mask=Causal())
    expected = jnp.einsum("BTNH,NHD->BTD", y, p["out"]["kernel"])
    if "bias" in p["out"]:
        expected += p["out"]["bias"][None, None]
    found = layer.apply({"params": p}, x, mask=Causal(), angles=turn)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_few_key_heads_are_many_that_are_alike(key):
    """And as many as there are heads of queries are what no number says."""
    x = jax.random.normal(key, (2, 6, 10))
    few = Attention(4, 8, 2, **F32)
    p = randomized(few.init(key, x), key)
    many = p | {n: {"kernel": jnp.repeat(p[n]["kernel"], 2, 1)} for n in ("key", "value")}
    found = few.apply({"params": p}, x, mask=Causal())
    for heads in (4, None):
        layer = Attention(4, 8, heads, **F32)
        expected = layer.apply({"params": many}, x, mask=Causal())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_causal_mask_hides_the_future(key):
    x = jax.random.normal(key, (1, 6, 32))
    layer = Attention(4, 8, **F32)
    v = layer.init(key, x)
    J = jax.jacobian(lambda x: layer.apply(v, x, mask=Causal()).sum(-1)[0])(x)[:, 0].sum(-1)
    assert (jnp.triu(J, 1) == 0).all() and (jnp.diag(J) != 0).all()


def test_cross_attention_looks_at_the_context_alone(key):
    x, context = jax.random.normal(key, (1, 3, 8)), jax.random.normal(key, (1, 5, 12))
    layer = Attention(2, 4, **F32)
    v = layer.init(key, x, context)
    assert nn.unbox(v)["params"]["key"]["kernel"].shape == (12, 2, 4)
    y = layer.apply(v, x, context)
    assert y.shape == x.shape
    shuffled = context[:, jnp.array([3, 1, 4, 0, 2])]
    np.testing.assert_allclose(layer.apply(v, x, shuffled), y, atol=1e-6)
    with pytest.raises(ValueError, match="angles rotate"):
        layer.apply(v, x, context, angles=jnp.zeros((1, 3, 2)))


def test_bad_heads_name_the_numbers(key):
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        Attention(4, 8, num_kv_heads=3).init(key, jnp.zeros((1, 2, 32)))


def test_shapes_are_checked(key):
    with pytest.raises(Exception, match=r"(?i)type"):
        Attention(4, 8).init(key, jnp.zeros((2, 32)))


def test_max_logit_is_told_to_who_asks(key):
    x = jax.random.normal(key, (2, 6, 32))
    layer = Attention(4, 8, **F32)
    v = layer.init(key, x)
    assert set(v) == {"params"}
    _, seen = layer.apply(v, x, mutable=["stats"])
    p = nn.unbox(v)["params"]
    q, k = (jnp.einsum("BTD,DNH->BTNH", x, p[n]["kernel"]) for n in ("query", "key"))
    expected = (jnp.einsum("BTNH,BSNH->BNTS", q, k) / 8**0.5).max((0, 2, 3))
    np.testing.assert_allclose(seen["stats"]["max_logit"][0], expected, rtol=1e-5)


ACTIVATIONS = {
    "gelu": (gelu, lambda x: 0.5 * x * (1 + jax.lax.erf(x / 2**0.5))),
    "gelu_tanh": (
        gelu_tanh,
        lambda x: 0.5 * x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3))),
    ),
    "quick_gelu": (quick_gelu, lambda x: x / (1 + jnp.exp(-1.702 * x))),
    "silu": (silu, lambda x: x / (1 + jnp.exp(-x))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients_are_their_formulas(name):
    x = jnp.linspace(-6, 6, 301)
    ours, formula = ACTIVATIONS[name]
    np.testing.assert_allclose(ours(x), formula(x), atol=2e-6)
    grads = [jax.vmap(jax.grad(f))(x) for f in (ours, formula)]
    np.testing.assert_allclose(*grads, atol=2e-6)


def test_gated_mlp_is_swiglu(key):
    x = jax.random.normal(key, (2, 3, 6))
    layer = Mlp(8, silu, gated=True, **F32)
    p = randomized(layer.init(key, x), key)
    hidden = jax.nn.silu(x @ p["gate"]["kernel"]) * (x @ p["up"]["kernel"])
    expected = hidden @ p["down"]["kernel"]
    np.testing.assert_allclose(layer.apply({"params": p}, x), expected, atol=1e-4)


def test_norms_are_their_formulas_and_run_in_float32(key):
    x = 3 * jax.random.normal(key, (2, 3, 16)) + 5
    p = {"scale": jnp.linspace(1, 2, 16), "bias": jnp.linspace(-1, 1, 16)}
    x64 = np.asarray(x, np.float64)
    centred = x64 - x64.mean(-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    layer = layer * np.linspace(1, 2, 16) + np.linspace(-1, 1, 16)
    np.testing.assert_allclose(LayerNorm().apply({"params": p}, x), layer, atol=1e-5)
    rms = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * np.linspace(1, 2, 16)
    scale = {"scale": p["scale"]}
    np.testing.assert_allclose(RMSNorm().apply({"params": scale}, x), rms, atol=1e-5)
    small = LayerNorm(epsilon=1e-2).apply({"params": p}, 1e-3 * x)
    assert abs(small - layer).max() > 0.5, "epsilon counts where x is small"
    half = LayerNorm().apply({"params": p}, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and abs(half - layer).max() < 0.05


def make(depth, **options):
    part = {"attention": Attention(4, 8, **F32), "mlp": Mlp(64, dropout=0.2, **F32)}
    return Stack(Block(**part, layer_scale=0.5, dropout=0.2), depth, **options)


@pytest.mark.parametrize(
    "options", [{}, {"remat": "full"}, {"remat": "dots"}, {"unroll": 3}], ids=str
)
def test_stack_equals_the_loop_with_its_gradient(options, key):
    x = jax.random.normal(key, (2, 6, 32))
    stack = make(3, **options)
    p = randomized(stack.init(key, x), key)
    turn = angles(jnp.arange(6)[None], 8)

    def loop(p, x):
        for i in range(3):
            layer = jax.tree.map(lambda a, i=i: a[i], p["block"])
            x = stack.block.apply({"params": layer}, x, angles=turn)
        return jnp.sin(x).sum()

    def scanned(p, x):
        return jnp.sin(stack.apply({"params": p}, x, angles=turn)).sum()

    a, b = (jax.jit(jax.value_and_grad(f))(p, x) for f in (loop, scanned))
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-4)


def test_layers_start_apart_and_carry_their_axis(key):
    v = make(3).init(key, jnp.ones((1, 2, 32)))
    kernel = nn.unbox(v)["params"]["block"]["attention"]["query"]["kernel"]
    assert kernel.shape == (3, 32, 4, 8) and not jnp.allclose(kernel[0], kernel[1])
    spec = nn.get_partition_spec(v)["params"]["block"]["attention"]["query"]["kernel"]
    assert spec == jax.P("layers", "embed", "heads", "head_dim")


def test_dropout_and_drop_path_act_in_training_alone(key):
    x = jax.random.normal(key, (4, 6, 32))
    stack = make(2, drop_path=0.9)
    v = stack.init(key, x)
    rngs = [{"dropout": jax.random.key(i)} for i in range(2)]
    quiet = [stack.apply(v, x, rngs=r) for r in rngs]
    loud = [stack.apply(v, x, train=True, rngs=r) for r in rngs]
    assert (quiet[0] == quiet[1]).all() and not jnp.allclose(loud[0], loud[1])


def test_drop_path_keeps_the_mean_and_drops_whole_examples(key):
    x = jnp.ones((4000, 1, 2))
    y = drop_path(x, 0.25, key)
    assert set(np.unique(y).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert (y[:, 0, 0] == y[:, 0, 1]).all() and abs(y.mean() - 1) < 0.03


def test_layer_scale_starts_at_its_value(key):
    y, v = LayerScale(0.1).init_with_output(key, jnp.ones((1, 2, 3)))
    assert (y == 0.1).all() and jax.tree.leaves(v)[0].shape == (3,)


def test_remat_that_is_none_of_the_known(key, unchecked):
    with pytest.raises(ValueError, match="remat='most' must be one of none, full, dots"):
        make(1, remat="most").init(key, jnp.ones((1, 2, 32)))


def test_pooling_does_not_care_for_order(key):
    pool = AttentionPool(Attention(4, 8, **F32), Mlp(64, **F32))
    x = jax.random.normal(key, (2, 6, 32))
    v = pool.init(key, x)
    turned = pool.apply(v, x[:, ::-1])
    np.testing.assert_allclose(pool.apply(v, x), turned, atol=1e-5)
