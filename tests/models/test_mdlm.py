import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models.decoder import flops
from jaxformer.models.mdlm import MASK_IDS, SIZES, Streams, denoiser, named, shifted
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


def test_operations_of_two_streams():
    """Blocks of a row see what a row does, twice; blocks of one what a causal row does."""
    model = named("llada-8b", vocab=11, width=16, depth=3, mlp_dim=24, num_heads=2)
    T, whole, causal = 8, flops(model, (8,)), flops(model.clone(causal=True), (8,))
    head = 2 * T * 16 * 11
    assert Streams(T)(model, (T,)) == 2 * whole - head
    # A causal row sees T (T + 1) / 2 pairs, as a clean one does; so does the noisy one.
    assert Streams(1)(model, (T,)) == 2 * causal - head
    assert Streams(2)(model, (T,)) < Streams(4)(model, (T,)) < Streams(T)(model, (T,))
