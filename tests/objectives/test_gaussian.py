import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.objectives.chain import CosineBetas, LinearBetas, chain, respaced
from jaxformer.objectives.gaussian import (
    PIXEL,
    Gaussian,
    bound,
    guess,
    prior,
    truth,
    weights,
)

CHAINS = {"linear": chain(LinearBetas()), "cosine": chain(CosineBetas(200))}
KINDS = ("noise", "data", "v")
X, NOISE = jax.random.normal(jax.random.key(0), (2, 5, 3))


@pytest.mark.parametrize("name", CHAINS)
def test_steps_one_after_the_other_are_the_closed_form(name):
    """Mean and variance of q(x_i | x_0), step by step, in float64."""
    table = CHAINS[name]
    mean, variance = 1.0, 0.0
    for i, beta in enumerate(table.betas):
        mean, variance = mean * np.sqrt(1 - beta), variance * (1 - beta) + beta
        assert table.kept[i] == pytest.approx(mean**2, rel=1e-12)
        assert 1 - table.kept[i] == pytest.approx(variance, rel=1e-9)
    i = jnp.array([0, 1, 50, 120, 199])
    zeros = jnp.zeros_like(X)
    for weigh, of in ((table.forward, table.kept), (table.step, 1 - table.betas)):
        np.testing.assert_allclose(weigh(X, i, zeros) ** 2, of[i, None] * X**2, rtol=1e-5)
        np.testing.assert_allclose(weigh(zeros, i, X) ** 2, (1 - of[i, None]) * X**2, rtol=1e-5)


@pytest.mark.parametrize("name", CHAINS)
def test_the_posterior_is_that_of_bayes(name):
    """A product of two normal laws of x_{i-1}: by x_0, and by x_i."""
    table = CHAINS[name]
    for i in (1, 2, 77, 199):
        beta, before = table.betas[i], table.before[i]
        variance = 1 / ((1 - beta) / beta + 1 / (1 - before))
        assert table.variance[i] == pytest.approx(variance, rel=1e-9)
        assert table.log_variance[i] == pytest.approx(np.log(variance), rel=1e-9)
        of_noisy = variance * np.sqrt(1 - beta) / beta
        of_data = variance * np.sqrt(before) / (1 - before)
        found = table.posterior(X, NOISE, jnp.full(5, i))
        np.testing.assert_allclose(found, of_data * X + of_noisy * NOISE, rtol=1e-5, atol=1e-6)
    assert table.variance[0] == 0 and table.log_variance[0] == table.log_variance[1]
    np.testing.assert_allclose(table.posterior(X, NOISE, jnp.zeros(5, int)), X, atol=1e-6)


def test_betas_are_those_of_their_papers():
    linear, cosine = LinearBetas().table(), CosineBetas().table()
    assert linear[0] == 1e-4 and linear[-1] == 0.02 and len(linear) == 1000
    assert LinearBetas(250).table()[0] == pytest.approx(4e-4)
    assert cosine[-1] == 0.999
    kept, f = np.cumprod(1 - cosine), np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert kept[499] == pytest.approx(f / np.cos(0.008 / 1.008 * np.pi / 2) ** 2, rel=1e-9)


def test_leaving_steps_out_keeps_alpha_bars_and_times():
    whole = CHAINS["linear"]
    for spacing, steps in (("even", 250), ("even", 7), ("stride", 50), ("even", 1000)):
        part = respaced(whole, steps, spacing)
        at = np.rint(part.times * 1000).astype(int)
        assert len(part) == steps and at[0] == 0
        np.testing.assert_allclose(part.kept, whole.kept[at], rtol=1e-12)
    assert np.rint(respaced(whole, 4).times * 1000).tolist() == [0, 333, 666, 999]
    assert np.rint(respaced(whole, 3).times * 1000).tolist() == [0, 500, 999]  # 499.5 is even.
    assert np.rint(respaced(whole, 2, "stride").times * 1000).tolist() == [0, 500]
    assert respaced(whole, 1).times.tolist() == [0]
    np.testing.assert_allclose(respaced(whole, 1000).betas, whole.betas, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_says_the_truth_has_the_data(kind):
    table, i = CHAINS["cosine"], jnp.array([0, 3, 50, 120, 190])
    at = table.forward(X, i, NOISE)
    found = guess(table, kind, truth(table, kind, X, NOISE, i), at, i)
    np.testing.assert_allclose(found.data, X, rtol=1e-3, atol=1e-4)
    assert found.log_variance is None
    np.testing.assert_allclose(table.noise_of(X, at, i)[1:], NOISE[1:], rtol=1e-3, atol=1e-3)


def test_a_learned_variance_has_its_range():
    table, i = CHAINS["linear"], jnp.array([0, 1, 500, 998, 999])
    for share, of in ((-1.0, table.log_variance), (1.0, np.log(table.betas))):
        said = jnp.concatenate([X, jnp.full_like(X, share)], -1)
        found = guess(table, "noise", said, X, i)
        wanted = np.broadcast_to(of[i, None], X.shape)
        np.testing.assert_allclose(found.log_variance, wanted, rtol=1e-5)


def test_the_bound_is_the_divergence_of_two_normal_laws():
    table, i = CHAINS["linear"], jnp.array([1, 10, 100, 500, 999])
    x = table.forward(X, i, NOISE)
    posterior = jnp.broadcast_to(jnp.asarray(table.log_variance, x.dtype)[i][:, None], x.shape)
    said = guess(table, "data", X, x, i)
    np.testing.assert_allclose(
        bound(table, said._replace(log_variance=posterior), X, x, i), 0, atol=1e-6
    )
    wide = said._replace(log_variance=posterior + 1, data=X + 0.1)
    off = 0.1 * table.of_data[i]
    nats = 0.5 * (1 - 1 + np.exp(-1) + off**2 * np.exp(-table.log_variance[i] - 1))
    np.testing.assert_allclose(bound(table, wide, X, x, i), nats / np.log(2), rtol=1e-3)
    all_noise = chain(LinearBetas(1000, 0.05, 0.1))
    assert jnp.abs(prior(all_noise, X)).max() < 1e-5
    little = chain(LinearBetas(1000, 1e-5, 1e-5))
    kept = little.kept[-1]
    each = 0.5 * (kept * np.asarray(X) ** 2 - kept - np.log(1 - kept)) / np.log(2)
    np.testing.assert_allclose(prior(little, X), each.mean(1), rtol=1e-5)


def test_the_last_step_costs_bytes():
    """Over all bytes its probabilities sum to 1, wherever the mean is."""
    table = CHAINS["linear"]
    bytes_ = jnp.arange(256)[:, None] * PIXEL - 1
    for mean, log_variance in ((0.1, -3.0), (-0.999, -9.0), (0.7, -12.0)):
        said = guess(table, "data", jnp.full((256, 1), mean), bytes_, jnp.zeros(256, int))
        said = said._replace(log_variance=jnp.full((256, 1), log_variance))
        bits = bound(table, said, bytes_, bytes_, jnp.zeros(256, int))
        assert (2.0**-bits).sum() == pytest.approx(1, abs=1e-4)


def test_min_snr_weighs_all_kinds_alike():
    table = CHAINS["linear"]
    snr = table.kept / (1 - table.kept)
    for kind, slope in (("noise", snr), ("data", 1.0), ("v", snr + 1)):
        found = weights(table, kind, 5.0) * slope
        np.testing.assert_allclose(found, np.minimum(snr, 5))
    assert (weights(table, "noise", None) == 1).all()


def apply(variables, x, t, label, train=False, rngs=None):
    """Says the noise of data that is all 0, and with it a variance of its own."""
    params = variables["params"]
    kept = jnp.interp(t, chain(LinearBetas()).times, chain(LinearBetas()).kept)
    noise = x / jnp.sqrt(1 - kept)[:, None, None, None]
    return jnp.concatenate([params["mean"] * noise, params["variance"] + 0 * noise], -1)


def test_the_objective_and_which_gradient_the_bound_has(key):
    from jaxformer.objectives.condition import Classes

    objective = Gaussian(Classes(3))
    x = jnp.zeros((16, 2, 2, 1)).at[8:].set(7.0)
    weight = jnp.array([1.0] * 8 + [0.0] * 8)
    batch = {"image": x, "label": jnp.zeros(16, int), "weight": weight}
    params = {"mean": 0.9, "variance": 0.3}

    def part(params, name):
        found = objective.measure(apply, params, batch, key)[name]
        return found.sum / found.count

    run = jax.jit(jax.value_and_grad(part), static_argnums=1)
    (error, slope), (bits, of_bits) = run(params, "error"), run(params, "bound")
    assert error == pytest.approx(0.01, rel=0.5) and slope["mean"] < 0
    assert slope["variance"] == 0 and of_bits["mean"] == 0 and of_bits["variance"] != 0
    value, seen = jax.jit(functools.partial(objective.loss, apply))(params, batch, key)
    assert seen["error"] + seen["bound"] == pytest.approx(float(value))
    found = objective.measure(apply, params, batch, key)
    assert found["loss"].count == 8
    assert found["loss"].sum == pytest.approx(8 * float(error + bits), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: respaced(CHAINS["cosine"], 201), "steps=201 must be from 1 to 200"),
        (lambda: respaced(CHAINS["linear"], 300, "stride"), "no stride leaves so many of 1000"),
        (lambda: chain(LinearBetas(10)), "every beta must lie in"),
        (lambda: Gaussian(min_snr=0.0), "min_snr=0.0 must be above 0"),
    ],
)
def test_what_cannot_be_is_told(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_kinds_are_checked(unchecked):
    with pytest.raises(InputError, match="kind='x0' must be one of noise, data, v"):
        Gaussian(kind="x0")  # pyright: ignore
