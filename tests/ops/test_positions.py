"""Patches and the positions they stand at."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.patches import grid, patchify, sincos_2d, unpatchify
from jaxformer.ops.rotary import angles, angles_2d, rotate


def test_patchify_is_a_strided_convolution(key):
    images = jax.random.normal(key, (2, 6, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (2, 2, 3, 5))
    convolved = jax.lax.conv_general_dilated(
        images, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    flat = patchify(images, 2) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(flat, convolved.reshape(2, 12, 5), atol=1e-5)


def test_unpatchify_is_the_inverse(key):
    images = jax.random.normal(key, (2, 6, 8, 3))
    assert (unpatchify(patchify(images, 2), 2, (6, 8)) == images).all()


def test_patch_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="patch=3 must divide the image's 6 rows, 8 columns"):
        patchify(jnp.zeros((1, 6, 8, 1)), 3)


def test_sincos_is_big_visions():
    """The formula of big_vision's posemb_sincos_2d, written out."""
    h, w, width = 3, 4, 16
    y, x = np.mgrid[:h, :w]
    omega = 1.0 / 10_000 ** (np.arange(4) / 3)
    y, x = np.einsum("m,d->md", y.flatten(), omega), np.einsum("m,d->md", x.flatten(), omega)
    expected = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    np.testing.assert_allclose(sincos_2d(h, w, width), expected, atol=1e-6)
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_2d(h, w, 6)


def test_sincos_without_its_endpoint_is_maes():
    """One number at a time, after the definition in MAE's util/pos_embed.py."""
    h, w, width = 3, 4, 12
    expected = np.zeros((h * w, width))
    for row in range(h):
        for column in range(w):
            for i in range(width // 4):
                omega = 1 / 10_000 ** (i / (width / 4))
                out = expected[row * w + column]
                out[i], out[3 + i] = math.sin(column * omega), math.cos(column * omega)
                out[6 + i], out[9 + i] = math.sin(row * omega), math.cos(row * omega)
    np.testing.assert_allclose(sincos_2d(h, w, width, endpoint=False), expected, atol=1e-6)
    assert abs(sincos_2d(h, w, width) - expected).max() > 1e-2
    assert sincos_2d(2, 2, 4, endpoint=False).shape == (4, 4)
    with pytest.raises(ValueError, match=">= 4, got 0"):
        sincos_2d(h, w, 0, endpoint=False)


def test_rotation_depends_on_distance_alone(key):
    q, k = jax.random.normal(key, (2, 1, 1, 1, 8))

    def product(a, b):
        at = lambda p: angles(jnp.array([[p]]), 8)  # noqa: E731
        return (rotate(q, at(a)) * rotate(k, at(b))).sum()

    np.testing.assert_allclose(product(3, 1), product(9, 7), rtol=1e-4)
    assert abs(product(3, 1) - product(3, 2)) > 1e-2


def test_rotation_keeps_length_and_turns_halves(key):
    x = jax.random.normal(key, (2, 5, 3, 8))
    turned = rotate(x, angles(jnp.arange(5)[None], 8))
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    a, b, t = x[0, 2, 0, 1], x[0, 2, 0, 5], 2 * 1e4 ** -(2 / 8)
    np.testing.assert_allclose(turned[0, 2, 0, 1], a * np.cos(t) - b * np.sin(t), rtol=1e-5)
    np.testing.assert_allclose(turned[0, 2, 0, 5], b * np.cos(t) + a * np.sin(t), rtol=1e-5)


def test_2d_angles_split_between_row_and_column():
    y, x = grid(2, 3)
    both = angles_2d(y, x, 8)
    assert both.shape == (6, 4)
    np.testing.assert_allclose(both[:, :2], angles(y, 4, 1e2))
    np.testing.assert_allclose(both[:, 2:], angles(x, 4, 1e2))
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        angles_2d(y, x, 6)
