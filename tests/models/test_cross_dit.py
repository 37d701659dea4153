import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models import cross_dit, dit
from jaxformer.models.cross_dit import CrossDiT
from jaxformer.objectives.flow_text import TextFlow
from tests.layers.test_block import randomized

MODEL = CrossDiT(12, 2, 2, 2, channels=3, vocab=7, length=5)


def test_a_text_is_heard_and_padding_is_not(key):
    """The first output is 0; then words, their order and what is real count."""
    x, t = jax.random.normal(key, (2, 4, 6, 3)), jnp.array([0.2, 0.9])
    text = jnp.array([[1, 2, 3, 0], [4, 5, 6, 6]])
    real = jnp.array([[True, True, True, False]] * 2)

    @jax.jit
    def run(params, text, real):
        return MODEL.apply({"params": params}, x, t, text, real)

    made = jax.jit(MODEL.init)(key, x, t, text, real)
    assert (run(nn.unbox(made)["params"], text, real) == 0).all()
    params = randomized(made, key)
    found = run(params, text, real)
    padded = run(params, text.at[:, 3].set(2), real)
    np.testing.assert_allclose(padded, found, atol=1e-6)
    assert np.abs(run(params, text.at[0, 1].set(5), real) - found)[0].max() > 1e-3
    turned = run(params, text[:, jnp.array([1, 0, 2, 3])], real)
    assert np.abs(turned - found).max() > 1e-3
    other = run(params, text, jnp.ones_like(real))
    assert np.abs(other - found).max() > 1e-3


def test_no_text_is_real_of_rows_that_are_dropped(key):
    """Each with its chance, and then all there is to know is the time."""
    x, t, text = jnp.ones((64, 2, 2, 3)), jnp.full(64, 0.5), jnp.full((64, 5), 3)
    real = jnp.ones_like(text, bool).at[:, 4].set(False)
    half = MODEL.clone(label_dropout=0.5, depth=1)
    shapes = jax.eval_shape(half.init, key, x, t, text, real)
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: draw.normal(0, 0.3, x.shape).astype(np.float32), nn.unbox(shapes)["params"]
    )

    @jax.jit
    def run(params):
        def says(real, **options):
            return half.apply({"params": params}, x, t, text, real, **options)

        dropped = says(real, train=True, rngs={"dropout": key})
        return says(real), says(jnp.zeros_like(real)), dropped

    told, none, found = run(params)
    assert np.abs(told - none).max() > 1e-3
    near = [np.abs(found - one).max((1, 2, 3)) < 1e-5 for one in (told, none)]
    assert (near[0] ^ near[1]).all() and 16 < near[1].sum() < 48


def test_it_learns_by_a_flow_of_texts(key):
    batch = {"image": jax.random.normal(key, (2, 4, 4, 3)), "tokens": jnp.ones((2, 5), int)}
    objective = TextFlow()
    inputs = objective.arguments(*(batch[name] for name in objective.inputs))
    params = jax.eval_shape(MODEL.init, key, *inputs)["params"]
    run = lambda p: objective.loss(MODEL.apply, p, batch, key)[0]  # noqa: E731
    slopes = jax.eval_shape(jax.grad(run), params)
    assert jax.tree.structure(slopes) == jax.tree.structure(params)
    more = cross_dit.flops(MODEL, (4, 4, 3), 5) - dit.flops(MODEL, (4, 4, 3))
    assert more == 2 * 2 * (2 * 4 * 144 + 2 * 5 * 144 + 2 * 4 * 5 * 12 + 3 * 144)


def test_classes_as_tokens_are_refused():
    with pytest.raises(ValueError, match="leave context=0"):
        CrossDiT(12, 2, 2, 2, context=1).parts()
