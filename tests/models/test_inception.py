import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.convert.families import kind_of
from jaxformer.convert.inception import INCEPTION
from jaxformer.models.inception import BLOCKS, InceptionV3, average, highest


def test_its_parameters_are_counted_as_timm_counts_them():
    """23,834,568 with 1,000 classes, and the means and variances of 94 norms beside them."""
    x = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    made = nn.unbox(jax.eval_shape(InceptionV3().init, jax.random.key(0), x))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(made)
    held = [x.size for path, x in leaves if path[-1].key in ("mean", "variance")]
    assert len(held) == 2 * 94
    assert sum(x.size for _, x in leaves) - sum(held) == 23_834_568


def test_a_mean_at_the_edge_counts_what_is_beyond_or_not():
    x = jnp.ones((1, 3, 4, 2))
    np.testing.assert_allclose(average(x, beyond=False), 1, rtol=1e-6)
    found = average(x, beyond=True)[0, :, :, 0]
    np.testing.assert_allclose(found[0], [4 / 9, 6 / 9, 6 / 9, 4 / 9], rtol=1e-6)
    np.testing.assert_allclose(found[1], [6 / 9, 1, 1, 6 / 9], rtol=1e-6)
    ramp = jnp.arange(5.0)[None, :, None, None] * jnp.ones((1, 5, 5, 1))
    assert highest(ramp)[0, :, 0, 0].tolist() == [2, 4]
    assert highest(-ramp, same=True)[0, :, 0, 0].tolist() == [0, 0, -1, -2, -3]


def test_the_network_of_the_original_distance_pools_otherwise():
    told = {"architecture": "inception_v3", "num_classes": 1008, "fid": True}
    model = INCEPTION.model(told, {"fc.weight"}, jnp.float32)
    assert model == InceptionV3(1008, fid=True) and kind_of(told) == "inception_v3"
    assert INCEPTION.model(told, set(), jnp.float32) == InceptionV3(0, fid=True)
    config = INCEPTION.config(model)
    assert config is not None and told.items() <= config.items()
    pools = [model.pool(name) for name in BLOCKS]
    assert pools == 3 * ["inner"] + ["half"] + 4 * ["inner"] + ["half", "inner", "highest"]
    assert {InceptionV3().pool(name) for name in BLOCKS} == {"average", "half"}


def test_a_picture_that_leaves_nothing_is_refused():
    x = jax.ShapeDtypeStruct((1, 74, 99, 3), jnp.float32)
    with pytest.raises(ValueError, match="74 x 99 are too small for InceptionV3"):
        jax.eval_shape(InceptionV3().init, jax.random.key(0), x)
