"""Where the patches of packed images lie, and positions resized to sizes that are data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import pack
from jaxformer.ops.resize import resize, weights

GRIDS = np.array([[[1, 2], [2, 2], [0, 0]], [[3, 1], [0, 0], [2, 1]], [[0, 0]] * 3])


def test_places_as_a_table():
    found = pack.places(jnp.array(GRIDS), 8)
    table = {
        "ids": [[1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 3, 3, 0, 0, 0], [0] * 8],
        "y": [[0, 0, 0, 0, 1, 1, 0, 0], [0, 1, 2, 0, 1, 0, 0, 0], [0] * 8],
        "x": [[0, 1, 0, 1, 0, 1, 0, 0], [0] * 8, [0] * 8],
        "rows": [[1, 1, 2, 2, 2, 2, 1, 1], [3, 3, 3, 2, 2, 1, 1, 1], [1] * 8],
        "columns": [[2, 2, 2, 2, 2, 2, 1, 1], [1] * 8, [1] * 8],
    }
    for name, expected in table.items():
        np.testing.assert_array_equal(getattr(found, name), expected, err_msg=name)


def test_too_many_patches_for_a_row_are_told():
    with pytest.raises(ValueError, match="a row of 5 patches cannot hold images of 6"):
        pack.places(jnp.array(GRIDS), 5)


@pytest.mark.parametrize("old", [1, 7, 16])
@pytest.mark.parametrize("new", [1, 3, 16, 37])
def test_weights_of_traced_sizes_are_those_of_known_ones(old, new):
    expected = weights(old, new, method="bilinear", antialias=True)
    found = jax.jit(pack.weights, static_argnums=2)(
        jnp.arange(new)[None], jnp.full((1, new), new), old
    )
    np.testing.assert_allclose(found[0], expected, atol=2e-6)


def test_a_table_is_resized_for_each_image_and_compiled_once(key):
    table = jax.random.normal(key, (5, 4, 3))
    compiled = jax.jit(lambda grids: pack.resize(table, pack.places(grids, 12)))
    for grids in (GRIDS, GRIDS[:, ::-1]):
        found = np.asarray(compiled(jnp.array(grids)))
        for row, some in zip(found, grids.tolist(), strict=True):
            start = 0
            for y, x in some:
                if y:
                    own = resize(table, (y, x), method="bilinear", antialias=True)
                    own = np.asarray(own).reshape(-1, 3)
                    np.testing.assert_allclose(row[start : start + y * x], own, atol=1e-5)
                start += y * x
    assert compiled._cache_size() == 1
