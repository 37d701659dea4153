import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Chain, Mlp, Stack
from jaxformer.layers.connect import (
    Gather,
    Merge,
    Pool,
    Project,
    Resampler,
    ResamplerBlock,
    splice,
)
from tests.layers.record_gather import PATH
from tests.layers.test_block import randomized


def resampler(count=3, width=10, out=None):
    attention = Attention(2, 4, dtype=jnp.float32)
    block = ResamplerBlock(attention, Mlp(12, dtype=jnp.float32))
    return Resampler(count, Stack(block, 2), out)


CASES = {
    "linear": (Project(8), (2, 24, 8)),
    "mlp": (Project(8, hidden=12), (2, 24, 8)),
    "merged": (Merge(2, (4, 6)), (2, 6, 40)),
    "merged along rows": (Merge((1, 3), (4, 6)), (2, 8, 30)),
    "merged and projected": (Chain((Merge(2, (4, 6)), Project(8))), (2, 6, 8)),
    "pooled": (Pool(2, (4, 6)), (2, 6, 10)),
    "resampled": (resampler(), (2, 3, 10)),
    "gathered": (Gather(3, 8, 2), (2, 9, 8)),
    "resampled and projected": (resampler(out=Project(8)), (2, 3, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_connector_gives_so_many_vectors_of_the_width(name):
    model, shape = CASES[name]
    tokens = 25 if name == "gathered" else 24
    x = jax.ShapeDtypeStruct((2, tokens, 10), jnp.float32)
    made = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], x)
    assert made.shape == shape


def test_merging_lays_neighbours_side_by_side():
    x = jnp.arange(24.0).reshape(1, 24, 1)  # A grid of 4 x 6.
    first = Merge(2, (4, 6)).apply({}, x)[0, 0]
    np.testing.assert_array_equal(first, [0, 1, 6, 7])
    along = Merge((1, 3), (4, 6)).apply({}, x)[0]
    np.testing.assert_array_equal(along[:2], [[0, 1, 2], [3, 4, 5]])
    assert Pool(2, (4, 6)).apply({}, x)[0, 1, 0] == (2 + 3 + 8 + 9) / 4
    square = Merge(2).apply({}, jnp.zeros((1, 16, 3)))
    assert square.shape == (1, 4, 12)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (Merge(2), "24 tokens are no grid of 5 x 5; give shape="),
        (Pool(4, (4, 6)), "side=4 must divide the grid's 4 x 6 patches"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(part, said):
    with pytest.raises(ValueError, match=said):
        part.apply({}, jnp.zeros((1, 24, 3)))


def test_latents_see_all_tokens_in_any_order_and_each_other(key):
    model = resampler()
    x = jax.random.normal(key, (2, 5, 10))
    params = randomized(jax.jit(model.init)(key, x), key)
    apply = jax.jit(model.apply)
    whole = apply({"params": params}, x)
    np.testing.assert_allclose(apply({"params": params}, x[:, ::-1]), whole, atol=1e-5)
    other = apply({"params": params}, x.at[:, 4, 0].add(1.0))
    assert jnp.abs(other - whole).max(-1).min() > 1e-4
    latents = params["latents"]["embedding"]
    moved = params | {"latents": {"embedding": latents.at[0, 0].add(1.0)}}
    assert jnp.abs(apply({"params": moved}, x) - whole)[:, 1:].max() > 1e-4


def test_features_go_in_order_where_they_are_asked_for():
    x = jnp.zeros((2, 4, 1))
    features = jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]])
    here = jnp.array([[False, True, False, True], [False, False, True, False]])
    np.testing.assert_array_equal(
        splice(x, features, here)[..., 0], [[0, 1, 0, 2], [0, 0, 3, 0]]
    )
    short = splice(x, features[:, :1], here)[..., 0]
    np.testing.assert_array_equal(short, [[0, 1, 0, np.nan], [0, 0, 3, 0]])


@pytest.mark.parametrize("rows", [4, 3])
def test_queries_that_look_once_are_as_qwen_vls(rows):
    """Recorded with torch's attention; positions of 3 x 3 queries, and of 4 x 4 tokens."""
    with np.load(PATH) as file:
        arrays = dict(file)
    D, N, H = 8, 2, 4
    q, k, v = np.split(arrays["attn.in_proj_weight"], 3)
    biases = np.split(arrays["attn.in_proj_bias"], 3)

    def norm(name):
        return {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}

    params = {
        name: {"kernel": weight.T.reshape(D, N, H), "bias": bias.reshape(N, H)}
        for name, weight, bias in zip(("query", "key", "value"), (q, k, v), biases, strict=True)
    }
    params |= {
        "input": {"kernel": arrays["kv_proj.weight"].T},
        "queries": {"embedding": arrays["query"]},
        "query_norm": norm("ln_q"),
        "context_norm": norm("ln_kv"),
        "norm": norm("ln_post"),
        "gather": {
            "kernel": arrays["attn.out_proj.weight"].T.reshape(N, H, D),
            "bias": arrays["attn.out_proj.bias"],
        },
        "out": {"out": {"kernel": arrays["proj"]}},
    }
    model = Gather(3, D, N, Project(D, use_bias=False))
    x = jnp.asarray(arrays[f"in:{rows}"])
    made = jax.jit(model.apply)({"params": jax.tree.map(jnp.asarray, params)}, x)
    np.testing.assert_allclose(made, arrays[f"out:{rows}"], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="24 tokens are no square"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 24, 10)))
