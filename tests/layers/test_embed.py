import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.embed import CenteredAngles, GridPosition, PatchEmbed
from jaxformer.layers.pool import Average, First, FirstAndAverage, Rest


def test_centered_angles_span_the_image_whatever_its_grid():
    small, large = (CenteredAngles(8).apply({}, *grid) for grid in [(2, 3), (4, 6)])
    # Rows lie at -1/2 and 1/2: the fastest pair there is turned half around.
    np.testing.assert_allclose(small[:, 0], np.repeat([-np.pi, np.pi], 3), atol=1e-5)
    columns = 2 * np.pi * np.tile([-2 / 3, 0, 2 / 3], 2)
    np.testing.assert_allclose(small[:, 2], columns, atol=1e-5)
    np.testing.assert_allclose(small[:, 3], columns / 10, atol=1e-5)
    four = large.reshape(2, 2, 3, 2, 4).mean((1, 3)).reshape(6, 4)
    np.testing.assert_allclose(four, small, atol=1e-5)
    assert abs(large).max() < 2 * np.pi


@pytest.mark.parametrize(
    ("field", "value"), [("shift", 0.1), ("jitter", 1.5), ("rescale", 2.0)]
)
def test_angles_are_moved_in_training_alone(field, value, key):
    angles = CenteredAngles(8, **{field: value})
    keys = jax.random.split(key, 200)
    draw = jax.jit(jax.vmap(lambda k: angles.apply({}, 2, 2, train=True, rngs={"dropout": k})))
    plain, moved = angles.apply({}, 2, 2), draw(keys)
    np.testing.assert_array_equal(plain, CenteredAngles(8).apply({}, 2, 2))
    if field == "shift":
        reach = (moved - plain[None])[..., [0, 2]] / (2 * np.pi)
        assert abs(reach).max() <= 0.1 and abs(reach).max() > 0.09 and abs(reach.mean()) < 0.02
    else:
        factor = moved / plain[None]
        assert factor.min() >= 1 / value - 1e-5 and factor.max() <= value + 1e-5
        assert factor.min() < 1.1 / value and factor.max() > value / 1.1
        both = jnp.allclose(factor[..., 0], factor[..., 2], rtol=1e-5)
        assert both == (field == "rescale")


@pytest.mark.parametrize("own", [0, 1, 3])
def test_positions_are_of_patches_and_the_first_tokens_before_them(own, key):
    """Of none of the tokens before the patches, of the class token, and of registers too."""
    images = jax.random.normal(key, (2, 8, 8, 3))
    embed = PatchEmbed(
        4, 6, GridPosition(6, prefix=own), prefix=1, registers=2, dtype=jnp.float32
    )
    p = nn.unbox(embed.init(key, images))["params"]
    assert p["position"]["embedding"].shape == (own + 4, 6)
    without = {**p, "position": {"embedding": jnp.zeros((own + 4, 6))}}
    added = embed.apply({"params": p}, images).x - embed.apply({"params": without}, images).x
    expected = jnp.concatenate([jnp.zeros((3 - own, 6)), p["position"]["embedding"]])
    expected = jnp.concatenate([expected[3 - own : 3], expected[: 3 - own], expected[3:]])
    np.testing.assert_allclose(added[0], expected, atol=1e-6)
    tokens = embed.apply({"params": without}, images).x
    np.testing.assert_array_equal(tokens[0, 0], p["cls"]["embedding"][0])
    np.testing.assert_array_equal(tokens[0, 1:3], p["registers"]["embedding"])


def test_poolings_are_their_formulas(key):
    x = jax.random.normal(key, (2, 5, 3))
    both = FirstAndAverage(2).apply({}, x)
    np.testing.assert_allclose(both[:, :3], x[:, 0])
    np.testing.assert_allclose(both[:, 3:], x[:, 2:].mean(1), atol=1e-6)
    rest = Rest(First(), 3).apply({}, x)
    np.testing.assert_array_equal(rest, x[:, 3])
    np.testing.assert_allclose(
        Rest(Average(), 1).apply({}, x), Average(1).apply({}, x), atol=1e-6
    )
