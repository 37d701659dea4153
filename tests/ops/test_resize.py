"""Grids at another resolution: PyTorch's numbers, and the definition by loops."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.resize import resize, weights
from tests.ops.record_resize import FILE, GRIDS, SHAPES

RECORDED = json.loads(FILE.read_text())
KINDS = [(m, a) for m in ("bicubic", "bilinear") for a in (False, True)]


def kernel(x, method, a):
    x = abs(x)
    if method == "bilinear":
        return max(0.0, 1 - x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def by_loops(old, new, method, antialias):
    """One sample of the new at a time, in float64, from the definition."""
    out = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        if antialias:
            wide = max(1.0, old / new)
            for j in range(old):
                out[i, j] = kernel((j - place) / wide, method, -0.5)
            out[i] /= out[i].sum()
        else:
            for j in range(math.floor(place) - 3, math.floor(place) + 5):
                out[i, min(max(j, 0), old - 1)] += kernel(j - place, method, -0.75)
    return out


def test_every_kind_is_recorded():
    assert len(RECORDED) == len(KINDS) * len(GRIDS) * len(SHAPES)


@pytest.mark.parametrize(("method", "antialias"), KINDS)
def test_equals_pytorch(method, antialias):
    cases = [c for c in RECORDED if (c["method"], c["antialias"]) == (method, antialias)]
    assert cases
    for case in cases:
        x, y = (jnp.array(case[name])[..., None] for name in "xy")
        found = resize(x, y.shape[:2], method=method, antialias=antialias)
        np.testing.assert_allclose(found, y, atol=1e-5)


@pytest.mark.parametrize(("method", "antialias"), KINDS)
@pytest.mark.parametrize(("old", "new"), [(16, 37), (37, 10), (14, 14), (1, 3), (24, 1)])
def test_equals_the_definition(old, new, method, antialias):
    expected = by_loops(old, new, method, antialias)
    found = weights(old, new, method=method, antialias=antialias)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def test_the_kinds_differ_by_more_than_the_tolerance():
    made = [weights(16, 11, method=m, antialias=a) for m, a in KINDS]
    for i, one in enumerate(made):
        assert all(np.abs(one - other).max() > 1e-2 for other in made[:i])


def test_the_same_size_is_the_same_grid(key):
    x = jax.random.normal(key, (5, 7, 3))
    for method, antialias in KINDS:
        np.testing.assert_allclose(
            resize(x, (5, 7), method=method, antialias=antialias), x, atol=1e-6
        )


def test_batches_and_dtypes(key):
    x = jax.random.normal(key, (2, 3, 6, 5, 4))
    found = jax.jit(lambda x: resize(x, (4, 8)))(x)
    one = resize(x[1, 2], (4, 8))
    np.testing.assert_allclose(found[1, 2], one, atol=1e-6)
    half = x.astype(jnp.bfloat16)
    rounded = resize(half.astype(jnp.float32), (4, 8)).astype(jnp.bfloat16)
    assert (resize(half, (4, 8)) == rounded).all()


@pytest.mark.parametrize(("method", "antialias"), KINDS)
def test_the_gradient_is_the_transpose(method, antialias, key):
    x = jax.random.normal(key, (6, 5, 2))
    y, back = jax.vjp(lambda x: resize(x, (9, 3), method=method, antialias=antialias), x)
    ct = jax.random.normal(jax.random.key(1), y.shape)
    rows, columns = by_loops(6, 9, method, antialias), by_loops(5, 3, method, antialias)
    expected = np.einsum("yY,xX,yxD->YXD", rows, columns, np.asarray(ct, np.float64))
    np.testing.assert_allclose(back(ct)[0], expected, atol=1e-5)


def test_errors_say_what_is_wrong(unchecked):
    with pytest.raises(ValueError, match="method='nearest' must be bicubic or bilinear"):
        weights(4, 2, method="nearest")
    with pytest.raises(ValueError, match="grid of 4 samples cannot become one of 0"):
        resize(jnp.zeros((4, 4, 1)), (0, 2))
