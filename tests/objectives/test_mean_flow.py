import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.models.span_dit import SpanDiT
from jaxformer.objectives.condition import Classes
from jaxformer.objectives.flow import Flow
from jaxformer.objectives.mean_flow import MeanFlow, spans, target
from jaxformer.objectives.times import Uniform
from jaxformer.samplers.jumps import Jumps, sample
from tests.layers.test_block import randomized

S = 0.5  # The deviation of the data, which is normal.


def width(t):
    """The deviation at a time: the flow moves points along with it."""
    return jnp.sqrt((1 - t) ** 2 * S**2 + t**2)


def mean_velocity(x, t):
    now, span = t[:, :1], t[:, 1:]
    moved = x * width(now - span) / width(now)
    slope = jax.vmap(jax.grad(lambda t: jnp.log(width(t))))(t[:, 0])[:, None] * x
    return jnp.where(span > 0, (x - moved) / jnp.where(span > 0, span, 1), slope)


def test_the_true_mean_velocity_says_what_it_should():
    """By the velocity of all points at a place, not that of one of them."""
    x = jax.random.normal(jax.random.key(0), (64, 3))
    t = spans(jax.random.key(1), 64, Uniform(), 0.8)
    t = jnp.clip(t, 0.02, 0.98).at[:, 1].set(jnp.minimum(t[:, 1], t[:, 0] - 0.01))

    @jax.jit
    def run(x, t, scale):
        v = mean_velocity(x, t.at[:, 1].set(0))
        return target(lambda x, t: scale * mean_velocity(x, t), x, v, t)

    said, wanted = run(x, t, 1.0)
    np.testing.assert_allclose(wanted, said, rtol=2e-3, atol=2e-3)
    said, wanted = run(x, t, 0.9)
    assert jnp.abs(said - wanted).max() > 0.05


@pytest.mark.parametrize("steps", [1, 4])
def test_it_moves_noise_to_data_in_any_number_of_jumps(steps):
    x = jax.random.normal(jax.random.key(0), (5, 2))
    found = sample(mean_velocity, x, steps=steps)
    np.testing.assert_allclose(found, S * x, rtol=1e-4)


def test_times_and_spans():
    t = np.asarray(spans(jax.random.key(0), 400, Uniform(), 0.25))
    assert (t[:, 1] > 0).sum() == 100 and (t[:, 0] - t[:, 1] >= 0).all()
    assert (np.asarray(spans(jax.random.key(0), 8, Uniform(), 0.0))[:, 1] == 0).all()


def test_a_dit_learns_it_and_a_span_of_none_is_a_flow(key):
    model = SpanDiT(16, 2, 2, 2, channels=1, num_classes=3, label_dropout=0.0)
    x, label = jax.random.normal(key, (8, 4, 4, 1)), jnp.arange(8) % 3
    objective = MeanFlow(Classes(3))
    batch = {"image": x, "label": label}
    arguments = objective.arguments(x, label)
    params = randomized(jax.jit(model.init)(key, *arguments), key)
    apply = jax.jit(model.apply)
    none = jnp.stack([jnp.full(8, 0.4), jnp.zeros(8)], 1)
    alone = apply({"params": params}, x, none[:, 0], label)
    np.testing.assert_allclose(apply({"params": params}, x, none, label), alone, atol=1e-5)
    far = apply({"params": params}, x, none.at[:, 1].set(0.3), label)
    assert jnp.abs(far - alone).max() > 1e-3

    @jax.jit
    def run(params):
        grad = jax.value_and_grad(functools.partial(objective.loss, model.apply), has_aux=True)
        return grad(params, batch, key)

    (value, seen), grads = run(params)
    assert np.isfinite(value) and seen["error"] > 0 and value < 1
    slope = grads["condition"]["span"]["up"]["kernel"]
    assert np.isfinite(slope).all() and jnp.abs(slope).max() > 0
    found = objective.measure(model.apply, params, batch | {"weight": jnp.zeros(8)}, key)
    assert found["loss"].count == 0 and found["loss"].sum == 0


def test_another_objective_has_nothing_to_jump_by():
    with pytest.raises(InputError, match="Flow has no mean velocities to jump by"):
        Jumps().draw(lambda x, t: x, Flow(), jnp.ones((1, 2)), jax.random.key(0))


def test_what_it_is_told_turns_slowly_with_time(key):
    """Or the derivative by it drowns what is learned: 700 times as large with thousandths."""
    model = SpanDiT(16, 2, 2, 2, channels=1, num_classes=3)
    told = model.parts().condition
    t, label = jnp.array([[0.5, 0.2], [0.9, 0.9]]), jnp.array([0, 1])
    params = told.init(key, t, label)
    params = jax.tree.map(lambda x: jax.random.normal(key, x.shape), params)
    value, rate = jax.jvp(
        lambda t: told.apply(params, t, label).condition, (t,), (jnp.ones_like(t),)
    )
    assert jnp.linalg.norm(rate) < jnp.linalg.norm(value)
