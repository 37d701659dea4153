"""Probes against scikit-learn and plain NumPy, for every chunk, with padding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from jaxformer import metrics, probe

N, D, V = 120, 7, 4
CHUNKS = (1000, 120, 32)


def examples(seed=0, n=N, scale=2.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(V, size=n)
    means = np.random.default_rng(9).normal(size=(V, D))
    features = means[labels] + scale * rng.normal(size=(n, D)) + 5
    return features.astype(np.float32), labels.astype(np.int32)


def padded(x, y, short=9):
    """The same with rows of NaN and of no class in front and behind, at weight 0."""
    edge = np.full((short, x.shape[1]), np.nan, np.float32)
    weight = np.ones(len(x) + 2 * short, np.float32)
    weight[:short] = weight[-short:] = 0
    return np.concatenate([edge, x, edge]), np.pad(y, short, constant_values=-1), weight


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_fit_is_scikit_learns(l2):
    x, y = examples()
    x[:, 2] *= 1e3
    sklearn = LogisticRegression(C=1 / (l2 * N), tol=1e-8, max_iter=5000)
    scaler = StandardScaler().fit(x)
    sklearn.fit(scaler.transform(x), y)
    new, _ = examples(1)
    new[:, 2] *= 1e3
    expected = sklearn.predict_proba(scaler.transform(new))
    found = None
    for chunk in CHUNKS:
        linear = jax.jit(partial(probe.fit, num_classes=V, l2=l2, chunk=chunk))(x, y)
        assert linear.gradient <= 1e-5 and 5 < linear.steps < 100
        found = jax.nn.softmax(linear.logits(jnp.asarray(new)))
        np.testing.assert_allclose(found, expected, atol=3e-4)
    assert np.ptp(expected) > 0.9, "which says something"


def test_padding_does_not_change_the_fit():
    x, y = examples()
    fit = jax.jit(partial(probe.fit, num_classes=V, chunk=50))
    plain, filled = fit(x, y), fit(*padded(x, y))
    np.testing.assert_allclose(plain.kernel, filled.kernel, atol=1e-4)
    np.testing.assert_allclose(plain.std, filled.std, rtol=1e-5)


def test_fit_is_deterministic_and_takes_constant_features():
    x, y = examples()
    x[:, 3] = 0.1
    fit = jax.jit(partial(probe.fit, num_classes=V))
    a, b = fit(x, y), fit(x, y)
    np.testing.assert_array_equal(a.kernel, b.kernel)
    assert np.isfinite(a.kernel).all() and not a.kernel[3].any()
    np.testing.assert_array_equal(
        *(a.logits(jnp.asarray(z)) for z in (x, np.where(np.arange(D)[None] == 3, 9, x)))
    )


def test_fit_stops_after_its_steps():
    x, y = map(jnp.asarray, examples())
    assert probe.fit(x, y, num_classes=V, steps=3).steps == 3


def cosines(a, b):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_votes_are_those_of_numpy(chunk):
    x, y = examples()
    queries, truth = examples(1, 33)
    table = cosines(queries, x)
    order = np.argsort(-table, axis=1, kind="stable")[:, :5]
    expected = np.zeros((33, V))
    for row, near in enumerate(order):
        for i in near:
            expected[row, y[i]] += np.exp(table[row, i] / 0.07)
    found = jax.jit(partial(probe.vote, num_classes=V, k=5, chunk=chunk))(queries, x, y)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    right = metrics.top(found, jnp.asarray(truth))["top1"]
    assert int(right.sum) == (expected.argmax(1) == truth).sum()


def test_of_equal_neighbours_the_first_comes_first():
    keys = jnp.tile(jnp.eye(2), (6, 1))
    for chunk in (1, 3, 5, 12):
        cosine, rows = probe.neighbours(jnp.eye(2), keys, k=8, chunk=chunk)
        assert rows.tolist() == [[0, 2, 4, 6, 8, 10, 1, 3], [1, 3, 5, 7, 9, 11, 0, 2]]
        assert cosine[0].tolist() == [1] * 6 + [0] * 2
    with pytest.raises(ValueError, match="k=13 neighbours are more than the 12 keys; lower k"):
        probe.neighbours(jnp.eye(2), keys, k=13)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_ranks_are_those_of_numpy(chunk):
    keys, ids = examples()
    queries, wanted = examples(1, 33, 0.1)
    wanted[:3] = V + 1  # which no key has.
    table = cosines(queries, keys)
    right = wanted[:, None] == ids
    best = np.where(right, table, -np.inf).max(1)
    expected = (~right & (table >= best[:, None])).sum(1)
    found = jax.jit(partial(probe.ranks, chunk=chunk))(queries, wanted, keys, ids)
    assert found.tolist() == expected.tolist() and (expected[:3] == N).all()
    assert 0 < (expected[3:] < 1).mean() < 1
    weight = jnp.asarray(np.arange(33) < 20, jnp.float32)
    counted = probe.recall(found, weight)
    for k in probe.AT:
        mean = counted[f"@{k}"]
        assert (int(mean.sum), int(mean.count)) == ((expected[:20] < k).sum(), 20)
        assert mean.sum.dtype == mean.count.dtype == jnp.int32


def test_what_says_nothing_finds_nothing():
    ids = jnp.arange(12)
    for empty in (jnp.zeros((12, D)), jnp.full((12, D), jnp.nan), jnp.ones((12, D))):
        rank = probe.ranks(empty, ids, empty, ids)
        assert (rank >= 11).all(), "a tie is no hit"
        scores = probe.vote(empty, empty, ids, num_classes=12, k=12)
        assert int(metrics.top(scores, ids)["top1"].sum) == 0


def test_zero_shot_compares_directions():
    texts = jnp.stack([jnp.eye(3) * 4, jnp.eye(3) + 1], axis=1)
    classes = probe.ensemble(texts)
    np.testing.assert_allclose(jnp.linalg.norm(classes, axis=1), 1, rtol=1e-6)
    scores = probe.zero_shot(7 * jnp.eye(3), classes)
    np.testing.assert_allclose(scores, probe.zero_shot(jnp.eye(3), 3 * classes), rtol=1e-6)
    assert scores.argmax(1).tolist() == [0, 1, 2]
    np.testing.assert_allclose(classes[0, 0] ** 2 + 2 * classes[0, 1] ** 2, 1, rtol=1e-6)
