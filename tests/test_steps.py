import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.steps import init_state, train_step, with_stats

TRUTH = jnp.arange(3.0)


def loss_fn(params, batch, key):
    error = batch["x"] @ params["w"] - batch["y"]
    noise = 0 * jax.random.normal(key, ())
    return jnp.mean(error**2) + noise, {"largest": jnp.abs(error).max()}


@pytest.fixture
def batch(key):
    x = jax.random.normal(key, (16, 3))
    return {"x": x, "y": x @ TRUTH}


def run(batch, key, steps=60, tx=None, **options):
    tx = tx or optax.adam(0.1)
    step = jax.jit(functools.partial(train_step, loss_fn=loss_fn, tx=tx, **options))
    state = init_state({"w": jnp.zeros(3)}, tx, ema=options.get("ema") is not None)
    for _ in range(steps):
        state, metrics = step(state, batch, key)
    return state, metrics


def test_descends_to_the_truth(batch, key):
    state, metrics = run(batch, key, 300)
    assert int(state.step) == 300 and metrics["loss"] < 1e-3
    np.testing.assert_allclose(state.params["w"], TRUTH, atol=0.05)
    assert set(metrics) == {"loss", "grad_norm", "largest"}


def test_first_update_is_the_optimizers(batch, key):
    state, metrics = run(batch, key, 1, optax.sgd(0.1))
    grad = jax.grad(lambda w: loss_fn({"w": w}, batch, key)[0])(jnp.zeros(3))
    np.testing.assert_allclose(state.params["w"], -0.1 * grad, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(grad), rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_accumulation_equals_the_whole_batch(parts, batch, key):
    whole, m = run(batch, key, 5)
    split, n = run(batch, key, 5, accumulate=parts)
    np.testing.assert_allclose(whole.params["w"], split.params["w"], rtol=1e-4)
    np.testing.assert_allclose(m["loss"], n["loss"], rtol=1e-4)


def test_accumulation_that_does_not_divide(batch, key):
    with pytest.raises(ValueError, match="accumulate=3 must divide the batch, which has 16"):
        run(batch, key, 1, accumulate=3)


def test_every_step_and_part_draws_anew_and_a_resumed_step_draws_the_same(key):
    def noise(params, batch, key):
        drawn = jax.random.normal(key, ())
        return params["w"].sum() * 0 + drawn, {}

    tx = optax.sgd(0.0)
    state = init_state({"w": jnp.zeros(3)}, tx)
    step = functools.partial(train_step, loss_fn=noise, tx=tx)
    state1, m0 = step(state, {}, key)
    _, m1 = step(state1, {}, key)
    assert m0["loss"] != m1["loss"] and step(state1, {}, key)[1]["loss"] == m1["loss"]


def test_ema_is_the_running_average(batch, key):
    tx = optax.sgd(0.1)
    state = init_state({"w": jnp.ones(3)}, tx, ema=True)
    new, _ = train_step(state, batch, key, loss_fn=loss_fn, tx=tx, ema=0.9)
    np.testing.assert_allclose(new.ema["w"], 0.9 + 0.1 * new.params["w"], rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_step_that_is_not_finite_is_left_out(bad, batch, key):
    broken = batch | {"y": batch["y"].at[3].set(bad)}
    tx = optax.adam(0.1)
    step = jax.jit(
        functools.partial(train_step, loss_fn=loss_fn, tx=tx, ema=0.9, skip_nonfinite=True)
    )
    state, _ = step(init_state({"w": jnp.zeros(3)}, tx, ema=True), batch, key)
    after, metrics = step(state, broken, key)
    assert metrics["skipped"] == 1 and int(after.step) == 2
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()), after.replace(step=state.step), state
    )
    assert all(jax.tree.leaves(same))
    for _ in range(3):
        after, metrics = step(after, broken, key)
    assert jnp.isfinite(after.params["w"]).all(), "never applied in the end"
    after, metrics = step(after, batch, key)
    assert metrics["skipped"] == 0 and (after.params["w"] != state.params["w"]).all()


def test_stats_go_to_the_optimizer_and_not_into_the_metrics(batch, key):
    seen = []

    def update(updates, state, params=None, *, stats=None, **_):
        seen.append(stats)
        return updates, state

    tx = optax.chain(
        optax.sgd(0.1),
        optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update),
    )

    def apply(variables, x, mutable):
        assert mutable == ["stats"]
        return x @ variables["params"]["w"], {"stats": {"peak": x.max()}}

    def loss(apply, params, batch, key):
        return jnp.mean((apply({"params": params}, batch["x"]) - batch["y"]) ** 2), {}

    for parts in (1, 4):
        step = functools.partial(
            train_step, loss_fn=with_stats(loss, apply), tx=tx, accumulate=parts
        )
        state = init_state({"w": jnp.zeros(3)}, tx)
        with jax.disable_jit():
            _, metrics = step(state, batch, key)
        assert set(metrics) == {"loss", "grad_norm"}
        np.testing.assert_allclose(seen[-1]["peak"], batch["x"].max())
