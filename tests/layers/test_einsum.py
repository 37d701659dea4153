import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.einsum import Einsum

EQUATIONS = {
    "BTD,DNH->BTNH": ((2, 3, 6), {"N": 4, "H": 5}, ("embed", "heads", "head_dim")),
    "BTNH,NHD->BTD": ((2, 3, 4, 5), {"D": 6}, ("heads", "head_dim", "embed")),
    "BTD,DF->BTF": ((2, 3, 6), {"F": 7}, ("embed", "mlp")),
    "BTP,PD->BTD": ((2, 3, 9), {"D": 6}, (None, "embed")),
    "BD,DV->BV": ((2, 6), {"V": 10}, ("embed", "vocab")),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_equals_the_einsum_it_is_written_as(equation, key):
    shape, sizes, axes = EQUATIONS[equation]
    x = jax.random.normal(key, shape)
    layer = Einsum(equation, sizes, use_bias=True, dtype=jnp.float32)
    y, variables = layer.init_with_output(key, x)
    assert nn.get_partition_spec(variables)["params"]["kernel"] == jax.P(*axes)
    params = nn.unbox(variables)["params"]
    params["bias"] += 1.5
    y = layer.apply({"params": params}, x)
    expected = jnp.einsum(equation, x, params["kernel"]) + 1.5
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_lowers_to_one_product_of_matrices(equation):
    shape, sizes, _ = EQUATIONS[equation]
    layer = Einsum(equation, sizes, dtype=jnp.float32)
    x = jnp.zeros(shape)
    jaxpr = jax.make_jaxpr(layer.apply)(layer.init(jax.random.key(0), x), x)
    dots = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(dots) == 1 and dots[0].invars[1].aval.ndim == 2
    assert not any(e.primitive.name == "transpose" for e in jaxpr.eqns)


def test_output_keeps_the_variance_of_its_fan_in(key):
    for equation, (shape, sizes, _) in EQUATIONS.items():
        wide = dict.fromkeys(sizes, 64)
        x = jax.random.normal(key, tuple(64 if n > 3 else 8 for n in shape))
        y, _ = Einsum(equation, wide, dtype=jnp.float32).init_with_output(key, x)
        assert 0.8 < y.std() < 1.2, equation


def test_computes_in_dtype_and_keeps_float32_parameters(key):
    y, v = Einsum("BTD,DF->BTF", {"F": 4}, True).init_with_output(key, jnp.ones((1, 2, 3)))
    assert y.dtype == jnp.bfloat16
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(v))


def test_an_equation_it_cannot_lower_is_named(key):
    with pytest.raises(ValueError, match="got 'BTD,FD->BTF'"):
        Einsum("BTD,FD->BTF", {"F": 4}).init(key, jnp.ones((1, 2, 3)))
