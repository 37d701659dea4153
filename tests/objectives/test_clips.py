import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.objectives.clips import least_variance, variances
from jaxformer.objectives.schedules import Clipped
from jaxformer.objectives.unmask import by_time


def test_the_clipped_schedule_of_least_variance_is_found():
    """Of a model that knows what stands beside much that is seen, and else next to nothing."""
    tokens, key = jnp.zeros((256, 16), jnp.int32), jax.random.key(0)

    def guess(noisy, tokens):
        share = (noisy == 9).mean(1, keepdims=True)
        return jnp.broadcast_to(jnp.where(share > 0.5, 3.0, 0.5), noisy.shape)

    def variance(low, high):
        noisy = by_time(tokens, key, mask_id=9, schedule=Clipped(max(low, 1e-3), high))
        return float((guess(noisy.tokens, tokens) * noisy.weight).mean(1).var())

    found = least_variance(guess, tokens, key, mask_id=9, step=0.25)
    ends = [0.0, 0.25, 0.5, 0.75, 1.0]
    pairs = [(a, b) for a in ends for b in ends if b - a >= 0.5]
    assert (found.low, found.high) == min(pairs, key=lambda pair: variance(*pair)) == (0.5, 1)
    assert variance(0.5, 1.0) < variance(0.0, 1.0) / 2
    told = variances(guess, tokens, key, mask_id=9, step=0.25)
    for (low, high), schedule in zip(pairs, told, strict=True):
        assert (schedule.low, schedule.high) == (max(low, 1e-3), high)
        assert told[schedule] == pytest.approx(variance(low, high), rel=1e-4)
    hidden = jnp.broadcast_to(jnp.arange(16) < 8, tokens.shape)
    half = variances(guess, tokens, key, mask_id=9, hidden=hidden, width=1.0)
    noisy = by_time(tokens, key, mask_id=9, schedule=Clipped(1e-3, 1.0), hidden=hidden)
    each = (guess(noisy.tokens, tokens) * noisy.weight)[:, :8].mean(1)
    assert half == {Clipped(1e-3, 1.0): pytest.approx(float(each.var()), rel=1e-4)}


def test_padding_has_no_variance_and_a_step_divides_the_whole():
    tokens = jnp.zeros((64, 4), jnp.int32)
    guess = lambda noisy, tokens: jnp.ones(noisy.shape)  # noqa: E731
    hidden = jnp.arange(64)[:, None].repeat(4, 1) < 32
    how = {"mask_id": 9, "width": 1.0, "key": jax.random.key(0)}
    found = variances(guess, tokens, hidden=hidden, **how)
    assert np.isfinite(list(found.values())).all() and len(found) == 1
    with pytest.raises(InputError, match=r"width=2.0 must be a share"):
        variances(guess, tokens, **how | {"width": 2.0})
    with pytest.raises(InputError, match=r"step=0.3 must divide 1"):
        variances(guess, tokens, step=0.3, **how)
    assert all(c.high <= 1 for c in variances(guess, tokens, step=1 / 7, **how))
