"""Distillation: definitions in float64, limits, and gradients that spare the teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import sharding
from jaxformer.objectives import distill
from jaxformer.sharding import FSDP_TENSOR, make_mesh

KINDS = {
    "soft": lambda s, t: distill.soft(s, t, 3.0),
    "hard": distill.hard,
    "cosine": distill.cosine,
    "mean squared": distill.mean_squared,
}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def defined(kind, s, t):
    s, t = np.asarray(s, np.float64), np.asarray(t, np.float64)
    if kind == "soft":
        p, q = softmax(t / 3), softmax(s / 3)
        return 9 * (p * np.log(p / q)).sum(-1)
    if kind == "hard":
        return -np.log(np.take_along_axis(softmax(s), t.argmax(-1)[..., None], -1))[..., 0]
    if kind == "cosine":
        lengths = np.linalg.norm(s, axis=-1) * np.linalg.norm(t, axis=-1)
        return 1 - (s * t).sum(-1) / lengths
    return ((s - t) ** 2).mean(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition_and_spares_the_teacher(kind, key):
    s, t = 2 * jax.random.normal(key, (2, 3, 4, 7))
    found = KINDS[kind](s, t)
    assert found.shape == (3, 4) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, defined(kind, s, t), rtol=1e-5, atol=1e-6)
    half = KINDS[kind](s.astype(jnp.bfloat16), t.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    ds, dt = jax.grad(lambda s, t: KINDS[kind](s, t).sum(), argnums=(0, 1))(s, t)
    assert jnp.abs(ds).max() > 0 and not dt.any()


@pytest.mark.parametrize("kind", ["soft", "cosine", "mean squared"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind, key):
    s = jax.random.normal(key, (5, 7))
    value, grad = jax.value_and_grad(lambda x: KINDS[kind](x, s).sum())(s)
    np.testing.assert_allclose(value, 0, atol=1e-5)
    np.testing.assert_allclose(grad, 0, atol=1e-5)


def test_soft_gradients_keep_their_size_at_any_temperature(key):
    """Far above the logits they are those of centred logits' squares, over V (Hinton, 2.1)."""
    s, t = jax.random.normal(key, (2, 7))
    grad = jax.grad(lambda s: distill.soft(s, t, 1e3))(s)
    np.testing.assert_allclose(grad, ((s - s.mean()) - (t - t.mean())) / 7, atol=1e-3)
    with pytest.raises(ValueError, match=r"temperature=0\.0 must be above 0"):
        distill.soft(s, t, 0.0)


def test_a_class_that_the_teacher_rules_out_costs_nothing(key):
    s, t = jax.random.normal(key, (2, 7))
    t = t.at[2].set(-jnp.inf)
    for student in (s, s.at[2].set(-jnp.inf)):
        value, grad = jax.value_and_grad(distill.soft)(student, t)
        p, q = softmax(np.asarray(t, np.float64)), softmax(np.asarray(student, np.float64))
        seen = p > 0
        np.testing.assert_allclose(
            value, (p[seen] * np.log(p[seen] / q[seen])).sum(), rtol=1e-5
        )
        assert jnp.isfinite(grad).all()


def test_features_of_zero_have_finite_gradients():
    zero, one = jnp.zeros((1, 3)), jnp.ones((1, 3))
    value, grad = jax.value_and_grad(lambda s: distill.cosine(s, one).sum())(zero)
    assert value == 1 and jnp.isfinite(grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_equals_unsharded(kind, key):
    x = tuple(jax.random.normal(key, (2, 8, 7)))
    run = jax.jit(jax.value_and_grad(lambda s, t: KINDS[kind](s, t).mean()))
    expected = run(*x)
    mesh = make_mesh("data=4,fsdp=2")
    with sharding.use(mesh, FSDP_TENSOR):
        found = run(*jax.device_put(x, sharding.batch_sharding(mesh, FSDP_TENSOR)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
