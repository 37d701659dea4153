"""Thin matrices learn, and nothing else does: at first the model, merged the same again."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.layers.cache import empty
from jaxformer.lora import Lora, product
from jaxformer.optim import AdamW, Constant, Parts
from jaxformer.steps import init_state, train_step
from tests.layers.test_block import randomized
from tests.models import test_vlm

MODEL = Lora(test_vlm.MODEL, rank=2, alpha=3.0, names=("language/stack",))
TOKENS = jnp.array([[1, 1, 3, 4, 5], [1, 1, 6, 7, 8]])
IMAGES = jax.random.normal(jax.random.key(5), (2, 1, 4, 8, 3))


def init(key):
    return MODEL.init(key, TOKENS, IMAGES)["params"]


@functools.cache
def axes():
    return nn.get_partition_spec(jax.eval_shape(init, jax.random.key(0)))


@functools.cache
def params():
    thin = jax.jit(lambda key: nn.unbox(init(key)["lora"]))(jax.random.key(0))
    return {"model": test_vlm.params(), "lora": thin}


def apply(model, params, **options):
    run = jax.jit(lambda params: model.apply({"params": params}, TOKENS, IMAGES, **options))
    return run(params)


def test_at_first_it_is_the_model_to_the_bit():
    np.testing.assert_array_equal(
        apply(MODEL, params()), apply(test_vlm.MODEL, params()["model"])
    )


@pytest.mark.slow  # Compiles a program or two.
def test_merged_is_unmerged_and_no_longer_the_model():
    moved = randomized({"params": params()}, jax.random.key(1))
    plain = MODEL.merged(moved)
    merged = apply(test_vlm.MODEL, plain)
    np.testing.assert_array_equal(apply(MODEL, moved), merged)
    assert np.abs(merged - apply(test_vlm.MODEL, moved["model"])).max() > 1e-3
    kernels = moved["model"]["language"]["stack"]["block"]["attention"]["out"]["kernel"]
    thin = moved["lora"]["language"]["stack"]["block"]["attention"]["out"]
    down, up = thin["down"]["kernel"], thin["up"]["kernel"]
    for layer in range(2):  # [N, H, r] by [r, D].
        more = 1.5 * np.einsum("NHr,rD->NHD", down[layer], up[layer])
        found = plain["language"]["stack"]["block"]["attention"]["out"]["kernel"][layer]
        np.testing.assert_allclose(found, kernels[layer] + more, atol=1e-5)
    for name in ("vision", "connector"):
        jax.tree.map(np.testing.assert_array_equal, plain[name], moved["model"][name])


def test_a_cache_of_it_is_one_of_the_model():
    made = [
        empty(model, {"params": given}, 2, 6)
        for model, given in ((MODEL, params()), (test_vlm.MODEL, params()["model"]))
    ]
    assert jax.tree.structure(made[0]) == jax.tree.structure(made[1])


@pytest.mark.slow  # Compiles a program or two.
def test_only_thin_matrices_learn_and_have_state():
    recipe = Parts(AdamW(Constant(1e-2)), ("lora",))
    tx = recipe.make(axes(), 5)

    def loss(params, batch, key):
        logs = jax.nn.log_softmax(MODEL.apply({"params": params}, *batch)[:, :-1])
        return -jnp.take_along_axis(logs, TOKENS[:, 1:, None], 2).mean(), {}

    step = functools.partial(train_step, loss_fn=recipe.stopped(loss), tx=tx)

    @jax.jit
    def run(state):
        def one(state, _):
            state, metrics = step(state, (TOKENS, IMAGES), jax.random.key(0))
            return state, metrics["loss"]

        return jax.lax.scan(one, state, None, 5)

    first = init_state(params(), tx)
    thin = sum(x.size for x in jax.tree.leaves(params()["lora"]))
    assert sum(x.size for x in jax.tree.leaves(first.opt_state) if x.ndim) == 2 * thin
    state, losses = run(first)
    jax.tree.map(np.testing.assert_array_equal, state.params["model"], params()["model"])
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), state.params["lora"], params()["lora"]
    )
    assert all(jax.tree.leaves(moved)) and losses[-1] < losses[0]


def test_matrices_lie_as_their_kernels_do():
    attention = axes()["lora"]["language"]["stack"]["block"]["attention"]
    query, out = attention["query"], attention["out"]
    assert tuple(query["down"]["kernel"]) == ("layers", "embed", None)
    assert tuple(query["up"]["kernel"]) == ("layers", None, "heads", "head_dim")
    assert tuple(out["down"]["kernel"]) == ("layers", "heads", "head_dim", None)
    every = Lora(test_vlm.MODEL, rank=2)
    shapes = jax.eval_shape(every.init, jax.random.key(0), TOKENS, IMAGES)["params"]
    assert set(axes()["lora"]) == {"language"}
    assert set(shapes["lora"]) == {"vision", "connector", "language"}
    assert product(jnp.ones((5, 3, 2)), jnp.ones((5, 2, 4, 6)), (5, 3, 4, 6))[0, 0, 0, 0] == 2


def test_a_name_without_a_hidden_matrix_is_refused():
    wrong = Lora(test_vlm.MODEL, names=("language/table",))
    with pytest.raises(InputError, match="no hidden matrix is under 'language/table'"):
        jax.eval_shape(wrong.init, jax.random.key(0), TOKENS, IMAGES)
    with pytest.raises(InputError, match="rank=0 must be 1 or more"):
        jax.eval_shape(Lora(test_vlm.MODEL, 0).init, jax.random.key(0), TOKENS, IMAGES)
