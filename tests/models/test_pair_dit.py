import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models.pair_dit import PairCondition, PairDiT


def test_a_pair_is_the_sum_of_its_parts(key):
    """Four firsts, three seconds: label 6 is (2, 1)."""
    model, t = PairCondition(8, 4, 3, dropout=1.0), jnp.full(5, 0.3)
    label = jnp.array([6, 2, 12, 13, -1])
    params = nn.unbox(model.init(key, t, label))["params"]

    def told(label, **options):
        return model.apply({"params": params}, t, label, **options).condition[:, 0]

    found = told(label)
    first, second = (params[name]["embedding"] for name in ("first", "second"))
    assert first.shape == (5, 8) and second.shape == (4, 8)
    time = found[0] - first[2] - second[1]
    np.testing.assert_allclose(found[1], time + first[2] + second[0], atol=1e-6)
    np.testing.assert_allclose(found[2], time + first[4] + second[3], atol=1e-6)
    assert np.isnan(found[3:]).all()
    none = told(jnp.full(5, 12))
    np.testing.assert_array_equal(told(None), none)
    np.testing.assert_array_equal(told(jnp.arange(5), train=True, rngs={"dropout": key}), none)


def test_a_dit_is_told_pairs():
    tiny = {"width": 12, "depth": 1, "num_heads": 2, "patch": 2, "channels": 1}
    x, label = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32), jnp.array([0, 6])
    model = PairDiT(**tiny, num_classes=6, firsts=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(2), label)
    condition = nn.unbox(shapes)["params"]["condition"]
    assert condition.keys() == {"time", "first", "second"}
    with pytest.raises(ValueError, match="firsts=4 must divide num_classes=6"):
        model.clone(firsts=4).parts()
