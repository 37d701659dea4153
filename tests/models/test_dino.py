import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models.dino import DINOV2, DINOV3, Size, dinov2, dinov3

# What transformers' classes hold at these sizes, the mask's token included; published as
# 21 M, 86 M, 300 M, 1.1 B (without registers), and 21 M, 29 M, 86 M, 300 M, 840 M, 6,716 M
# (L+ has no number there).
DINOV2_COUNTS = {
    ("S", 0): 22_056_576,
    ("B", 0): 86_580_480,
    ("L", 0): 304_368_640,
    ("g", 0): 1_136_480_768,
    ("S", 4): 22_058_112,
    ("g", 4): 1_136_486_912,
}
DINOV3_COUNTS = {
    "S": 21_596_544,
    "S+": 28_692_864,
    "B": 85_660_416,
    "L": 303_129_600,
    "L+": 403_891_200,
    "H+": 840_592_640,
    "7B": 6_716_035_072,
}
TINY = Size(24, 2, 40, 3)


def count(model, size):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return sum(p.size for p in jax.tree.leaves(shapes))


@pytest.mark.parametrize(("size", "registers"), DINOV2_COUNTS)
def test_parameter_counts_of_dinov2(size, registers):
    model = dinov2(size, registers=registers)
    assert count(model, 518) == DINOV2_COUNTS[size, registers]


@pytest.mark.parametrize("size", DINOV3_COUNTS)
def test_parameter_counts_of_dinov3(size):
    assert count(dinov3(size), 32) == DINOV3_COUNTS[size]


def test_no_named_size_is_untested():
    assert {size for size, _ in DINOV2_COUNTS} == set(DINOV2)
    assert set(DINOV3_COUNTS) == set(DINOV3)


def test_a_size_that_is_none_lists_those_that_are():
    with pytest.raises(ValueError, match="size='XL' is not known; known are S, B, L, g"):
        dinov2("XL")
    with pytest.raises(ValueError, match="num_heads=5 must divide width=24"):
        dinov3(dataclasses.replace(TINY, num_heads=5))


def test_dinov3_serves_any_grid_by_its_angles_alone(key):
    """What it says of a patch hangs on where that lies in the image, not on the grid."""
    model = dinov3(TINY, patch=4)
    flat = jnp.ones((1, 8, 8, 3))
    params = nn.unbox(model.init(key, flat))["params"]
    answers = []
    for side in (2, 4, 37):
        image = jnp.broadcast_to(flat[:, :1, :1], (1, 4 * side, 4 * side, 3))
        answers.append(model.apply({"params": params}, image))
        assert jnp.isfinite(answers[-1]).all()
    far, near = (abs(a - answers[-1]).max() for a in answers[:2])
    assert near < far < 0.5


@pytest.mark.parametrize("model", [dinov2(TINY, patch=4, grid=(2, 2)), dinov3(TINY, patch=4)])
def test_masked_patches_are_not_seen(model, key):
    images = jax.random.normal(key, (2, 8, 8, 3))
    params = nn.unbox(model.init(key, images))["params"]
    params["embed"]["mask"]["embedding"] += 1.0
    masked = jnp.array([[False, True, False, False], [True, True, False, True]])
    hidden = jnp.repeat(jnp.repeat(masked.reshape(2, 2, 2), 4, 1), 4, 2)[..., None]
    other = jnp.where(hidden, 7.0, images)
    a, b, c = (
        model.apply({"params": params}, *x, method="encode")
        for x in [(images, masked), (other, masked), (images,)]
    )
    np.testing.assert_array_equal(a, b)
    assert abs(a - c).max() > 1e-3


def test_a_model_without_a_mask_token_says_so(key):
    model = dinov2(TINY, patch=4, grid=(2, 2), mask_token=False)
    with pytest.raises(ValueError, match="masked patches need a model with a mask token"):
        model.init(key, jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 4), bool))
