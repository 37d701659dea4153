import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models.mdlm import MASK_IDS, SIZES, denoiser, named, shifted
from tests.layers.test_block import randomized

PARAMETERS = {"llada-8b": 8_015_581_184, "dream-7b": 7_615_616_512}  # As published.


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_its_parameters(name):
    model = named(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == PARAMETERS[name]
    assert not model.causal and MASK_IDS[name] < model.vocab


def test_dreams_logits_are_those_of_the_token_before():
    model = named("dream-7b", vocab=11, width=16, depth=1, mlp_dim=24, num_heads=4)
    model = model.clone(num_kv_heads=2)
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 11)
    params = randomized(jax.jit(model.init)(jax.random.key(1), tokens), jax.random.key(2))
    plain, moved = (
        jax.jit(denoiser(model, params, shift=shift))(tokens, jnp.ones(2))
        for shift in (False, True)
    )
    np.testing.assert_array_equal(moved[:, 1:], plain[:, :-1])
    np.testing.assert_array_equal(moved[:, 0], plain[:, 0])
    assert (shifted(plain) == moved).all()


def test_an_unknown_name_lists_the_known():
    with pytest.raises(
        ValueError, match="'llada' is no model that unmasks; known are llada-8b"
    ):
        named("llada")
