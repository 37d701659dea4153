import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.draw import draw, uniform


def draws(key, logits, count, how):
    return jax.jit(jax.vmap(how, (0, None)))(jax.random.split(key, count), logits)


def test_a_tail_of_tiny_entries_is_drawn_as_often_as_it_weighs(key):
    tail = 1 << 22  # of 20 % together, 5e-8 each.
    logits = jnp.full(tail + 1, jnp.log(0.2 / tail)).at[0].set(jnp.log(0.8))
    ours = np.asarray(draws(key, logits, 1000, draw))
    assert 150 < (ours > 0).sum() < 250  # 200 +- 13.
    assert np.abs(ours[ours > 0].mean() / tail - 0.5) < 0.1
    one = jax.jit(jax.random.categorical)
    usual = [int(one(k, logits)) for k in jax.random.split(key, 24)]
    assert sum(x > 0 for x in usual) < 2  # and not 4.8: such an entry needs luck twice.


@pytest.mark.slow
def test_a_reveal_of_one_in_a_thousand_is_as_rare_as_that():
    """Of a mask and 50k tokens that share a chance of 1e-3, as one step of many leaves it."""
    V, chance, size, count = 50_000, 1e-3, 500, 40
    logits = jnp.full(V + 1, jnp.log(chance / V)).at[0].set(jnp.log1p(-chance))
    fast = {"xla_backend_optimization_level": 3}  # Tests have none: a thousand million numbers.

    def usual(key):
        return (jax.random.categorical(key, logits, shape=(size,)) > 0).sum()

    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), count)
    theirs = int(jax.jit(lambda k: jax.lax.map(usual, k), compiler_options=fast)(keys).sum())
    many = jax.random.split(jax.random.key(1), 10 * count * size)
    drawn = jax.jit(jax.vmap(draw, (0, None)), compiler_options=fast)
    ours = int((drawn(many, logits) > 0).sum())
    print(f"ours {ours} of {len(many)}, jax.random.categorical {theirs} of {count * size}")
    expected = chance * len(many)
    assert abs(ours - expected) < 3 * expected**0.5
    expected = chance * count * size
    assert theirs < expected - 3 * expected**0.5


@pytest.mark.parametrize("V", [1, 2, 10, 17])
def test_each_entry_is_drawn_by_its_probability(V, key):
    logits = 2 * jax.random.normal(key, (V,))
    count = 40_000
    found = np.bincount(np.asarray(draws(key, logits, count, draw)), minlength=V)
    expected = count * np.asarray(jax.nn.softmax(logits))
    assert ((found - expected) ** 2 / expected).sum() < V + 5 * (2 * V) ** 0.5
    assert found.size == V


def test_rows_are_drawn_each_by_itself_and_never_what_is_ruled_out(key):
    logits = jnp.where(jax.random.bernoulli(key, 0.2, (500, 3, 50)), 0.0, -jnp.inf)
    logits = logits.at[:, :, 49].set(-30.0)
    found = jax.jit(draw)(key, logits)
    assert found.shape == (500, 3) and found.dtype == jnp.int32
    assert jnp.isfinite(jnp.take_along_axis(logits, found[..., None], -1)).all()
    assert len(np.unique(np.asarray(found))) > 40


def test_uniforms_keep_their_digits_near_zero(key):
    found = np.asarray(jax.jit(uniform, static_argnums=1)(key, (1 << 20,)))
    assert 0 < found.min() < 1e-5 and found.max() < 1
    small = found[found < 2**-12].astype(np.float64) * 2**32
    assert (small % 256 != 0).mean() > 0.9  # More than 24 bits of them.
    assert abs(found.mean() - 0.5) < 2e-3
