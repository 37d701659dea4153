import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxformer import sharding
from jaxformer.layers.block import Mlp
from jaxformer.layers.moe import Experts, Moe
from jaxformer.ops.activation import silu
from jaxformer.ops.experts import balance_loss, route, z_loss
from tests.layers.test_block import randomized

F32 = {"dtype": jnp.float32}
B, T, D, F, E = 4, 6, 8, 12, 4


@functools.cache
def case():
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    layer = Moe(F, Experts(E, 2), **F32)
    return x, randomized(jax.jit(layer.init)(jax.random.key(1), x), jax.random.key(2))


def dense(params, x, top_k=2, renormalise=True):
    """Every expert on every token, weighed by 0 where it is not chosen."""
    logits = x @ params["router"]["kernel"]
    routed = route(logits, top_k, renormalise=renormalise)
    share = (jax.nn.one_hot(routed.expert, E) * routed.weight[..., None]).sum(2)
    gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
    h = silu(jnp.einsum("BTD,EDF->BTEF", x, gate)) * jnp.einsum("BTD,EDF->BTEF", x, up)
    return jnp.einsum("BTE,BTEF,EFD->BTD", share, h, down)


def value_and_gradients(run):
    def loss(params, x):
        y = run(params, x)
        return jnp.square(y).sum(), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize("capacity", [None, E / 2])
@pytest.mark.parametrize("renormalise", [True, False])
def test_experts_equal_the_dense_sum(capacity, renormalise):
    x, params = case()
    layer = Moe(F, Experts(E, 2, renormalise, capacity), **F32)

    def run(params, x):
        return layer.apply({"params": params}, x)

    found = value_and_gradients(run)(params, x)
    expected = value_and_gradients(functools.partial(dense, renormalise=renormalise))(params, x)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_expert_is_a_dense_mlp():
    x, _ = case()
    layer = Moe(F, Experts(1, 1), **F32)
    params = randomized(layer.init(jax.random.key(1), x), jax.random.key(2))
    mlp = {n: {"kernel": params[n]["kernel"][0]} for n in ("gate", "up", "down")}
    expected = Mlp(F, silu, gated=True, **F32).apply({"params": mlp}, x)
    chex.assert_trees_all_close(layer.apply({"params": params}, x), expected, atol=1e-5)


def test_what_finds_no_room_is_left_out_and_first_choices_go_first():
    x, params = case()
    params = params | {
        "router": {"kernel": jnp.zeros((D, E)).at[0].set(jnp.array([9, 6, 3, 0.0]))}
    }
    x = x.at[..., 0].set(1)  # Every token prefers expert 0, then 1.
    layer = Moe(F, Experts(E, 2, capacity=0.5), **F32)  # Room for 2 of 6 tokens.
    y = layer.apply({"params": params}, x)
    expected = dense(params, x)
    chex.assert_trees_all_close(y[:, :2], expected[:, :2], atol=1e-4)
    chex.assert_trees_all_close(y[:, 2:], jnp.zeros_like(y[:, 2:]))


@pytest.mark.parametrize("rules", [sharding.EXPERT, sharding.FSDP_TENSOR], ids=["all", "some"])
@pytest.mark.parametrize("capacity", [None, E / 2])
def test_on_a_mesh_they_equal_one_device(capacity, rules):
    x, params = case()
    layer = Moe(F, Experts(E, 2, capacity=capacity), **F32)

    def run(params, x):
        return layer.apply({"params": params}, x)

    expected = value_and_gradients(run)(params, x)
    mesh = sharding.make_mesh("data=2,expert=2,tensor=2")
    boxed = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    places = sharding.shardings(boxed, mesh, rules)
    with sharding.use(mesh, rules):
        lies = jax.device_put((params, x), (places, sharding.batch_sharding(mesh, rules)))
        step = value_and_gradients(run)
        found = step(*lies)
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
        if capacity and rules is sharding.EXPERT:
            assert "all-to-all" in step.lower(*lies).compile().as_text()


def test_the_routers_losses():
    x, params = case()
    layer = Moe(F, Experts(E, 2, balance=0.1, z=0.01), **F32)
    _, seen = layer.apply({"params": params}, x, mutable=["losses"])
    logits = x @ params["router"]["kernel"]
    routed = route(logits, 2)
    (balance,), (z,) = seen["losses"]["balance"], seen["losses"]["z"]
    chex.assert_trees_all_close(balance, 0.1 * balance_loss(logits, routed), rtol=1e-5)
    chex.assert_trees_all_close(z, 0.01 * z_loss(logits), rtol=1e-5)
    alike = jnp.zeros((1, E, E)) + jnp.eye(E)[None] * 1e-4  # Each prefers another.
    chex.assert_trees_all_close(balance_loss(alike, route(alike, 1)), 1.0, rtol=1e-3)
    chex.assert_trees_all_close(z_loss(jnp.zeros((1, 2, E))), jnp.log(E) ** 2, rtol=1e-6)


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="top_k=3 must lie in 1 to count=2"):
        Experts(2, 3)


def test_all_kernels_lie_with_their_experts():
    x, _ = case()
    axes = nn.get_partition_spec(
        jax.eval_shape(Moe(F, Experts(E, 2)).init, jax.random.key(0), x)
    )
    assert tuple(axes["params"]["gate"]["kernel"]) == ("expert", "embed", "mlp")
    assert tuple(axes["params"]["down"]["kernel"]) == ("expert", "mlp", "embed")
