"""Classification with a sigmoid for each class; the softmax is in tests/test_metrics.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import sharding
from jaxformer.experiment import Objective, override
from jaxformer.objectives.classify import Classify
from jaxformer.sharding import FSDP_TENSOR, make_mesh

B, V = 8, 6


def apply(variables, x, *, train=False, rngs=None):
    return x @ variables["params"]


def example(key):
    keys = jax.random.split(key, 3)
    label = jax.random.randint(keys[0], (B,), 0, V)
    batch = {"image": jax.random.normal(keys[1], (B, 4)), "label": label}
    return batch, jax.random.normal(keys[2], (4, V))


def binary(logits, targets):
    """big_vision's sigmoid_xent of every row, in float64."""
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    return -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_sigmoid_equals_the_definition(smoothing, key):
    objective = override(Classify(smoothing), "link=sigmoid")
    assert isinstance(objective, Objective) and objective.link == "sigmoid"
    batch, params = example(key)
    logits, hot = batch["image"] @ params, np.eye(V)[batch["label"]]
    loss, beside = objective.loss(apply, params, batch, key)
    expected = binary(logits, (1 - smoothing) * hot + smoothing / V)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    right = (logits.argmax(-1) == batch["label"]).mean()
    np.testing.assert_allclose(beside["accuracy"], right)

    weight = np.arange(B) % 3 > 0
    padded = batch | {
        "image": jnp.where(weight[:, None], batch["image"], jnp.nan),
        "weight": jnp.asarray(weight, jnp.float32),
    }
    found = objective.measure(apply, params, padded, key)
    assert int(found["loss"].count) == weight.sum()
    np.testing.assert_allclose(
        found["loss"].value(), binary(logits, hot)[weight].mean(), rtol=1e-5
    )
    plain = Classify(smoothing).measure(apply, params, padded, key)
    assert set(found) == set(plain) and found["top1"].value() == plain["top1"].value()


def test_sigmoid_is_stable_far_out():
    logits = jnp.array([[200.0, -200.0]])
    objective = Classify(link="sigmoid")
    for label, expected in ((0, 0.0), (1, 400.0)):
        batch = {"image": logits, "label": jnp.array([label])}
        loss = objective.loss(lambda v, x, **_: x, {}, batch, jax.random.key(0))[0]
        assert float(loss) == expected


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_sharded_equals_unsharded(link, key):
    batch, params = example(key)
    loss = functools.partial(Classify(0.1, link=link).loss, apply)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = step(params, batch, key)
    mesh = make_mesh("data=4,fsdp=2")
    with sharding.use(mesh, FSDP_TENSOR):
        batch = jax.device_put(batch, sharding.batch_sharding(mesh, FSDP_TENSOR))
        found = step(params, batch, key)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
