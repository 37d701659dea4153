"""Images and videos into patches: transformers' sizes, and what the device counts by."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.native import cut, fit, rows
from jaxformer.errors import InputError
from jaxformer.ops.pack import blocks
from tests.data.record_native import FILE, LAWS, sizes


@pytest.mark.parametrize("law", range(len(LAWS)))
def test_sizes_are_the_originals(law):
    theirs, law = json.loads(FILE.read_text())[law], LAWS[law]
    assert [list(fit(*size, **law)) for size in sizes()] == theirs


def test_patches_come_in_the_order_that_the_device_counts_by():
    """Each number says where it is: frame, row, column, channel."""
    f, y, x, c = np.mgrid[:3, :8, :12, :2]
    video = (f * 10**6 + y * 10**4 + x * 100 + c).astype(np.float32)
    made = rows([[video[0, :4], video]], patch=2, length=64, count=2, channels=2)
    assert made["grids"].tolist() == [[[1, 2, 6], [2, 4, 6]]]
    at = blocks(jnp.asarray(made["grids"]), 64, 2)
    first = made["patches"][0, :, 0].astype(int)
    frame, row, column = first // 10**6, first // 10**4 % 100, first // 100 % 100
    real = np.asarray(at.ids[0]) > 0
    assert real.sum() == 12 + 48
    np.testing.assert_array_equal(row[real], 2 * np.asarray(at.y[0])[real])
    np.testing.assert_array_equal(column[real], 2 * np.asarray(at.x[0])[real])
    np.testing.assert_array_equal(frame[12:60], 2 * (np.asarray(at.ids[0, 12:60]) - 2))
    # In a patch: frame, row, column, channel; of an odd video the last frame twice.
    np.testing.assert_array_equal(made["patches"][0, 12].reshape(2, 2, 2, 2), video[:2, :2, :2])
    last = made["patches"][0, 59].reshape(2, 2, 2, 2)
    np.testing.assert_array_equal(last, video[[2, 2], 6:, 10:])
    assert not made["patches"][0, 60:].any()


def test_bad_images_are_told():
    image = np.zeros((4, 8, 3))
    with pytest.raises(InputError, match="more than 200 times as long as wide"):
        fit(2, 401)
    with pytest.raises(InputError, match="image has shape"):
        cut(np.zeros((4, 8)), patch=2)
    with pytest.raises(InputError, match="4 x 6 pixels, which 2 patches of 2 do not divide"):
        cut(np.zeros((4, 6, 3)), patch=2)
    law = {"patch": 2, "length": 8, "count": 1}
    with pytest.raises(InputError, match="sample 1 has 2 images; a row holds 1"):
        rows([[], [image, image]], **law)
    with pytest.raises(InputError, match="sample 0, image 0 has 1 channels"):
        rows([[np.zeros((4, 8, 1))]], **law)
    with pytest.raises(InputError, match="image 0 ends at patch 16 and a row holds 8"):
        rows([[np.zeros((8, 8, 3))]], **law)
