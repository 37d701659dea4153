"""Every sampler against a mixture whose score is known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformer.errors import InputError
from jaxformer.objectives.chain import CosineBetas, LinearBetas, chain, respaced
from jaxformer.objectives.flow import Flow
from jaxformer.objectives.gaussian import Gaussian
from jaxformer.objectives.paths import VP, Cosine, Linear, Reading
from jaxformer.samplers import ddpm, dpm_solver, inpaint, ode, sde
from jaxformer.samplers.ddpm import Ddpm
from jaxformer.samplers.dpm_solver import DpmSolver
from jaxformer.samplers.noise import start
from jaxformer.samplers.ode import Ode
from jaxformer.samplers.sde import Sde
from tests.samplers import mixture

ROWS = 20_000
LINEAR = Flow(reading=Reading("data", Linear()))
CHAIN = Gaussian(kind="data", betas=CosineBetas())


def perfect(objective):
    """A model that says the data, under either objective."""

    def says(x, t):
        if isinstance(objective, Flow):
            p = objective.reading.path.at(t)
            return mixture.data(x, p.data, p.noise)
        kept = jnp.asarray(objective.chain.kept, x.dtype)[jnp.round(t * 1000).astype(int)]
        return mixture.data(x, jnp.sqrt(kept), jnp.sqrt(1 - kept))

    return says


@functools.partial(jax.jit, static_argnums=(0, 1))
def drawn(sampler, objective):
    noise, more = jax.random.split(jax.random.key(1))
    x = start(noise, (ROWS, 2))
    return sampler.draw(perfect(objective), objective, x, more)


CASES = [
    (Ode(60), LINEAR),
    pytest.param(Ode(300, "euler"), LINEAR, marks=pytest.mark.slow),
    pytest.param(
        Ode(60, end=1e-3), Flow(reading=Reading("data", VP())), marks=pytest.mark.slow
    ),
    pytest.param(
        Ode(60, shift=2.0), Flow(reading=Reading("data", Cosine())), marks=pytest.mark.slow
    ),
    (DpmSolver(60), LINEAR),
    (Sde(300, last=0.01), LINEAR),
    pytest.param(
        Sde(300, scale=2.0, last=0.01),
        Flow(reading=Reading("data", Cosine())),
        marks=pytest.mark.slow,
    ),
    (Ddpm(250), CHAIN),
    pytest.param(Ddpm(125, eta=0.0), CHAIN, marks=pytest.mark.slow),
    pytest.param(Ddpm(250, eta=0.7, spacing="stride"), CHAIN, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sampler", "objective"), CASES, ids=str)
def test_a_sampler_draws_mean_covariance_and_modes(sampler, objective):
    x = drawn(sampler, objective)
    assert mixture.differs(x) < 4.5


def test_the_judge_sees_a_law_that_is_not_right():
    x = np.asarray(drawn(Ode(60), LINEAR))
    for wrong in (x + 0.04, x * 1.05, np.concatenate([x, x[x[:, 0] < 0][:500]])):
        assert mixture.differs(wrong) > 4.5


def errors(objective, run, counts):
    """Root mean squares of what is off a fine solution, in float64."""
    x = jax.random.normal(jax.random.key(0), (256, 2), jnp.float64)
    says = perfect(objective)

    def velocity(x, t):
        return objective.reading.velocity(says(x, t), x, t)

    fine = jax.jit(functools.partial(ode.sample, velocity, steps=2048, end=0.02))(x)
    found = []
    for steps in counts:
        made = jax.jit(functools.partial(run, velocity, says, steps=steps, end=0.02))(x)
        found.append(float(jnp.sqrt(((made - fine) ** 2).mean())))
    return np.array(found)


@pytest.mark.parametrize(
    ("order", "run"),
    [
        (1, lambda v, d, x, **how: ode.sample(v, x, method="euler", **how)),
        (2, lambda v, d, x, **how: ode.sample(v, x, method="heun", **how)),
        (2, lambda v, d, x, **how: dpm_solver.sample(d, x, path=Cosine(), **how)),
    ],
    ids=["euler", "heun", "dpm-solver++"],
)
def test_orders_of_convergence(order, run):
    with jax.enable_x64(True):
        found = errors(Flow(reading=Reading("data", Cosine())), run, (64, 128, 256))
    slopes = np.log2(found[:-1] / found[1:])
    assert np.abs(slopes - order).max() < 0.2, (found, slopes)


def test_heun_to_the_end_is_of_second_order_and_asks_once_in_the_last_step():
    asked = []

    def velocity(x, t):  # x(0) = x(1) / e, and nothing to tell at 0.
        jax.debug.callback(lambda t: asked.append(float(t)), t[0])
        return jnp.where(t[:, None] == 0, jnp.nan, x)

    off = []
    for steps in (8, 16, 32):
        asked.clear()
        x = ode.sample(velocity, jnp.ones((1, 1)), steps=steps)
        jax.effects_barrier()
        assert len(asked) == 2 * steps - 1 and min(asked) > 0
        off.append(abs(float(x[0, 0]) - np.exp(-1)))
    assert np.log2(np.array(off[:-1]) / off[1:]).min() > 1.7


def test_an_sde_without_noise_is_eulers_ode():
    says = perfect(LINEAR)
    x = jax.random.normal(jax.random.key(0), (8, 2))
    key = jax.random.key(1)
    reading = LINEAR.reading
    found = sde.sample(says, x, key, reading=reading, steps=26, scale=0.0, last=1 / 26)

    def velocity(x, t):
        return reading.velocity(says(x, t), x, t)

    wanted = ode.sample(velocity, x, steps=26, method="euler")
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def denoiser(table, objective=CHAIN):
    return objective.guess(perfect(objective), table)


def test_ddim_without_noise_is_a_function_and_has_an_inverse():
    table = respaced(CHAIN.chain, 500)
    run = jax.jit(functools.partial(ddpm.sample, denoiser(table), chain=table, eta=0.0))
    back = jax.jit(functools.partial(ddpm.invert, denoiser(table), chain=table))
    noise = jax.random.normal(jax.random.key(0), (200, 2))
    x = run(noise, jax.random.key(1))
    assert (x == run(noise, jax.random.key(2))).all()
    assert jnp.abs(run(back(x), jax.random.key(3)) - x).mean() < 0.01
    assert jnp.abs(back(x) - noise).mean() < 0.03


def test_ddim_with_eta_1_is_ddpm():
    table = respaced(CHAIN.chain, 50)
    noise, key = jax.random.normal(jax.random.key(0), (200, 2)), jax.random.key(1)
    both = [
        jax.jit(functools.partial(ddpm.sample, denoiser(table), chain=table, eta=eta))(
            noise, key
        )
        for eta in (1.0, None)
    ]
    np.testing.assert_allclose(*both, atol=1e-4)


def test_a_learned_variance_is_used_but_for_the_last_step():
    table = respaced(chain(LinearBetas()), 10)
    objective = Gaussian(kind="data")

    def says(variance):
        return lambda x, t: jnp.concatenate([0 * x, jnp.full_like(x, variance)], -1)

    x, key = jnp.zeros((4000, 1)), jax.random.key(0)
    for variance, of in ((1.0, table.betas), (-1.0, np.exp(table.log_variance))):
        guess = objective.guess(says(variance), table)
        found = ddpm.sample(guess, x, key, chain=table)
        assert (found == 0).all()  # All data is 0, and the last step adds nothing.
        wanted = 0.0
        for i in range(9, 0, -1):
            wanted = table.of_noisy[i] ** 2 * wanted + of[i]
        seen = {}

        def look(x, i, seen=seen):
            jax.debug.callback(lambda i, v: seen.__setitem__(int(i), float(v)), i, x.var())
            return x

        ddpm.sample(guess, x, key, chain=table, keep=look)
        jax.effects_barrier()
        assert seen[0] == pytest.approx(wanted, rel=0.1)


def test_steps_left_out_hand_the_model_the_original_times():
    asked = []

    def says(x, t):
        jax.debug.callback(lambda t: asked.append(round(float(t) * 1000)), t[0])
        return x

    for spacing, wanted in (("even", [999, 666, 333, 0]), ("stride", [750, 500, 250, 0])):
        asked.clear()
        sampler = Ddpm(4, spacing=spacing)
        sampler.draw(says, Gaussian(), jnp.ones((1, 2)), jax.random.key(0))
        jax.effects_barrier()
        assert asked == wanted
    x = 3 * jnp.ones((1, 2))
    free = Ddpm(4).draw(lambda x, t: 9 * x, CHAIN, x, jax.random.key(0))
    held = Ddpm(4, clip=1.0).draw(lambda x, t: 9 * x, CHAIN, x, jax.random.key(0))
    assert jnp.abs(held).max() <= 1.001 < jnp.abs(free).max()


def test_what_is_known_of_a_picture_stays():
    path = Linear()
    noise = jax.random.normal(jax.random.key(0), (4000, 2))
    known = jnp.where(jnp.arange(2) == 0, -1.5, jnp.nan)[None].repeat(4000, 0)
    mask = jnp.arange(2)[None] == 0
    keep = inpaint.keeping(known, mask, noise, path)
    for sampler in (Ode(60), Sde(100), DpmSolver(60)):
        x = sampler.draw(perfect(LINEAR), LINEAR, noise, jax.random.key(1), keep=keep)
        assert (x[:, 0] == -1.5).all()
        # There the second number is of the first law, of which it is else three times in ten.
        assert (x[:, 1] > 0).mean() > 0.6 > 0.4 > (drawn(sampler, LINEAR)[:, 1] > 0).mean()


def test_what_is_known_stays_down_a_chain():
    known, noise = jnp.full((8, 2), 0.7), jax.random.normal(jax.random.key(0), (8, 2))
    mask = jnp.arange(2)[None] == 0
    table = respaced(CHAIN.chain, 20)
    keep = inpaint.keeping_steps(known, mask, noise, table)
    for step in (-1, 0, 12):
        wanted = known if step < 0 else table.forward(known, jnp.full(8, step), noise)
        found = keep(jnp.zeros((8, 2)), jnp.int32(step))
        np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=1e-5)
        assert (found[:, 1] == 0).all()
    x = Ddpm(20).draw(perfect(CHAIN), CHAIN, noise, jax.random.key(1), keep=keep)
    assert (x[:, 0] == 0.7).all() and np.isfinite(x).all()


@pytest.mark.parametrize("sampler", [Ode(4), Sde(4), DpmSolver(4), Ddpm(4)], ids=str)
def test_a_row_is_drawn_by_its_own_key_on_any_mesh(sampler):
    objective = CHAIN if isinstance(sampler, Ddpm) else LINEAR
    keys = jax.random.split(jax.random.key(0), 8)

    def run(keys):
        x = start(keys, (len(keys), 2))
        return sampler.draw(perfect(objective), objective, x, keys)

    alone = jax.jit(run)(keys[3:4])
    mesh = Mesh(jax.devices(), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    compiled = jax.jit(run, in_shardings=split, out_shardings=split).lower(keys).compile()
    assert not any(w in compiled.as_text() for w in ("all-gather", "all-reduce", "all-to-all"))
    np.testing.assert_allclose(compiled(jax.device_put(keys, split))[3:4], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "objective", "message"),
    [
        (Ddpm(1001), CHAIN, "steps=1001 must be from 1 to 1000: the schedule has no more"),
        (Ddpm(10), LINEAR, "Flow has no chain of steps to go down; draw by Ode"),
        (Ode(10), CHAIN, "Gaussian has steps and no velocity to follow; draw by Ddpm"),
        (Ode(0), LINEAR, "steps=0 must be 1 or more"),
        (Ode(2, end=-1.0), LINEAR, r"end=-1.0 must lie in \[0, 1\]"),
        (Sde(1), LINEAR, "steps=1 must be 2 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told(sampler, objective, message):
    with pytest.raises(InputError, match=message):
        sampler.draw(lambda x, t: x, objective, jnp.ones((1, 2)), jax.random.key(0))


def test_methods_are_checked(unchecked):
    with pytest.raises(InputError, match="method='rk4' must be one of euler, heun"):
        dataclasses.replace(Ode(), method="rk4").draw(
            lambda x, t: x, LINEAR, jnp.ones((1, 2)), jax.random.key(0)
        )
