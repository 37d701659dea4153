import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import metrics
from jaxformer.objectives.classify import Classify


def batches(key, n=37, V=6):
    logits = 2 * jax.random.normal(key, (n, V))
    return logits, jax.random.randint(jax.random.key(1), (n,), 0, V)


def test_equal_plain_numpy(key):
    logits, labels = batches(key)
    found = metrics.classification(logits, labels)
    order = np.argsort(-np.asarray(logits), axis=1)
    top = [(order[:, :k] == np.asarray(labels)[:, None]).any(1).sum() for k in (1, 5)]
    assert [int(found["top1"].sum), int(found["top5"].sum)] == top
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    nll = -np.log(probability[np.arange(37), labels])
    np.testing.assert_allclose(found["loss"].value(), nll.mean(), rtol=1e-5)
    confidence, right = probability.max(1), probability.argmax(1) == labels
    bins, error = np.floor(confidence * 15), 0.0
    for b in range(15):
        here = bins == b
        if here.any():
            error += here.mean() * abs(confidence[here].mean() - right[here].mean())
    np.testing.assert_allclose(found["calibration"].value(), error, rtol=1e-5)
    table = np.zeros((6, 6), int)
    np.add.at(table, (labels, probability.argmax(1)), 1)
    assert found["confusion"].value() == table.tolist()


def test_padding_weighs_nothing_and_parts_add_up(key):
    logits, labels = batches(key)
    whole = metrics.to_host(metrics.classification(logits, labels))
    total = None
    for start in range(0, 40, 8):
        rows = min(8, 37 - start)
        pad = [(0, 8 - rows), (0, 0)]
        part = metrics.classification(
            jnp.pad(logits[start : start + 8], pad, constant_values=jnp.nan),
            jnp.pad(labels[start : start + 8], pad[0]),
            (jnp.arange(8) < rows).astype(jnp.float32),
        )
        part = metrics.to_host(part)
        total = part if total is None else metrics.merge(total, part)
    for name in ("top1", "top5", "confusion"):
        assert total[name].sum.dtype == np.int64
        assert (total[name].sum == whole[name].sum).all()
    for name in whole:
        assert (total[name].count == whole[name].count).all()
        np.testing.assert_allclose(total[name].value(), whole[name].value(), rtol=1e-5)


def test_a_constant_output_is_right_for_no_class():
    found = metrics.classification(jnp.zeros((10, 7)), jnp.arange(10) % 7)
    assert found["top1"].value() == 0 and found["top5"].value() == 0


def test_a_model_of_nan_is_never_right():
    found = metrics.classification(jnp.full((4, 10), jnp.nan), jnp.arange(4))
    assert found["top1"].value() == found["top5"].value() == 0


def test_nothing_seen_is_nan():
    found = metrics.classification(jnp.zeros((2, 3)), jnp.zeros(2, int), jnp.zeros(2))
    assert np.isnan(found["top1"].value()) and np.isnan(found["calibration"].value())


def test_a_uniform_model_loses_log_V_and_smoothing_has_its_closed_form(key):
    logits, labels = batches(key)
    batch = {"image": logits, "label": labels}

    def loss(scale, **options):
        apply = lambda v, x, **_: scale * x  # noqa: E731
        return Classify(**options).loss(apply, {}, batch, key)[0]

    np.testing.assert_allclose(loss(0.0), np.log(6), rtol=1e-6)
    np.testing.assert_allclose(loss(0.0, smoothing=0.3), np.log(6), rtol=1e-6)
    log_p = jax.nn.log_softmax(logits)
    target = 0.8 * jax.nn.one_hot(labels, 6) + 0.2 / 6
    expected = -(target * log_p).sum(1).mean()
    np.testing.assert_allclose(loss(1.0, smoothing=0.2), expected, rtol=1e-6)
    soft = batch | {"target": jnp.flip(jax.nn.one_hot(labels, 6), 0)}
    found = Classify().loss(lambda v, x, **_: x, {}, soft, key)[0]
    expected = -(soft["target"] * log_p).sum(1).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    half = batch | {"weight": (jnp.arange(37) < 10).astype(jnp.float32)}
    found = Classify().loss(lambda v, x, **_: x, {}, half, key)[0]
    expected = -log_p[jnp.arange(10), labels[:10]].mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_errors_add_as_variances_do():
    """Two halves of one variance each: twice the count, the root of twice the variance."""
    half = metrics.Error(4.0, 10)
    assert half.value() == 0.2
    assert metrics.merge(half, half).value() == pytest.approx(8**0.5 / 20)
    assert np.isnan(metrics.Error(0.0, 0).value())
