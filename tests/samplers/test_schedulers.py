"""Chains and samplers against the numbers of diffusers, written by record_schedulers.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.objectives.chain import CosineBetas, LinearBetas, chain
from jaxformer.objectives.gaussian import Gaussian
from jaxformer.samplers import ode
from jaxformer.samplers.ddpm import Ddpm
from tests.samplers.record_schedulers import FILE, X, noise_of

RECORDED = json.loads(FILE.read_text())
ROWS, KEY = jnp.array([X]), jax.random.key(0)


def says(x, t):
    return noise_of(x, 1000 * t[:, None])


def test_chains_are_theirs():
    for name, betas in (("linear", LinearBetas()), ("cosine", CosineBetas())):
        table = chain(betas)
        np.testing.assert_allclose(table.kept[[0, 1, 500, 998]], RECORDED[name], rtol=2e-4)
    table = chain(LinearBetas())
    np.testing.assert_allclose(
        table.variance[[1, 500, 999]], RECORDED["ddpm variance"], rtol=1e-3
    )


@pytest.mark.parametrize(
    ("theirs", "kind"), [("epsilon", "noise"), ("v_prediction", "v"), ("sample", "data")]
)
def test_ddim_is_theirs(theirs, kind):
    sampler = Ddpm(20, eta=0.0, spacing="stride")
    found = jax.jit(lambda x: sampler.draw(says, Gaussian(kind=kind), x, KEY))(ROWS)
    np.testing.assert_allclose(found[0], RECORDED[f"ddim {theirs}"], rtol=1e-4, atol=1e-5)


def test_the_last_step_of_ddpm_is_theirs():
    objective = Gaussian()
    guess = objective.guess(says, objective.chain)(ROWS, jnp.int32(0))
    found = objective.chain.posterior(guess.data, ROWS, jnp.zeros(1, int))
    np.testing.assert_allclose(found[0], RECORDED["ddpm last step"], rtol=1e-5)


def test_eulers_steps_at_shifted_times_are_theirs():
    found = ode.sample(says, ROWS, steps=8, method="euler", shift=3.0)
    np.testing.assert_allclose(found[0], RECORDED["flow euler shift 3"], rtol=1e-5)
