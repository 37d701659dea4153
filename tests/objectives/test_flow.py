import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.objectives import flow
from jaxformer.objectives.condition import Classes, known
from jaxformer.objectives.flow import Flow
from jaxformer.objectives.paths import VP, Cosine, Linear, Reading, turned
from jaxformer.objectives.times import LogitNormal, Mode, Shifted, Uniform, times

PATHS = (Linear(), Cosine(), VP())
KINDS = ("velocity", "noise", "data")
T = jnp.linspace(0.05, 0.95, 19)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_rates_are_the_derivatives_of_weights(path):
    ends = path.at(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(ends.data, [1, 0], atol=0.007)
    np.testing.assert_allclose(ends.noise, [0, 1], atol=1e-4)
    for weight, rate in (("data", "data_rate"), ("noise", "noise_rate")):
        slope = jax.vmap(jax.grad(lambda t, w=weight: getattr(path.at(t), w)))(T)
        np.testing.assert_allclose(getattr(path.at(T), rate), slope, rtol=2e-4)


def test_variance_keeping_paths_keep_it():
    for path in PATHS[1:]:
        p = path.at(T)
        np.testing.assert_allclose(p.data**2 + p.noise**2, 1, rtol=1e-6)
    # SiT's coefficients in its own time, 1 for data, in float64.
    u = 1 - np.asarray(T, np.float64)
    log = -0.25 * (1 - u) ** 2 * (20 - 0.1) - 0.5 * (1 - u) * 0.1
    np.testing.assert_allclose(VP().at(T).data, np.exp(log), rtol=1e-5)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_what_a_model_says_in_one_way_it_says_in_all(path):
    x, e = jax.random.normal(jax.random.key(0), (2, 19, 3))
    p = jax.tree.map(lambda w: w[:, None], path.at(T))
    at, v = p.data * x + p.noise * e, p.data_rate * x + p.noise_rate * e
    truth = dict(zip(KINDS, (v, e, x), strict=True))
    for said in KINDS:
        reading = Reading(said, path, least=1e-6)
        for read in KINDS:
            found = getattr(reading, read)(truth[said], at, T)
            np.testing.assert_allclose(found, truth[read], rtol=1e-3, atol=2e-4)
        np.testing.assert_allclose(
            reading.score(truth[said], at, T), -e / p.noise, rtol=1e-3, atol=1e-3
        )


def test_the_least_weight_bounds_what_is_divided_by():
    reading = Reading("data", least=0.05)
    x = jnp.ones((2, 1))
    found = reading.velocity(jnp.zeros((2, 1)), x, jnp.array([0.01, 0.5]))
    np.testing.assert_allclose(found[:, 0], [1 / 0.05, 2.0])


def test_the_other_convention_of_time():
    """SiT's time is 1 for data: x_u = u x + (1 - u) e, with velocity x - e."""
    x, e = jnp.full((2, 1), 3.0), jnp.full((2, 1), 1.0)
    u = jnp.array([0.25, 0.5])

    def theirs(at, u):  # Right on this path only.
        np.testing.assert_allclose(at, u[:, None] * x + (1 - u[:, None]) * e)
        return x - e

    at = (1 - u[:, None]) * x + u[:, None] * e  # Ours, at the same numbers.
    with pytest.raises(AssertionError):
        theirs(at, u)
    np.testing.assert_allclose(turned(theirs)(at, u), e - x)
    np.testing.assert_allclose(turned(turned(theirs))(at, 1 - u), x - e)


LAWS = (Uniform(), LogitNormal(), LogitNormal(0.8, 0.8), Mode(), Shifted(3.0), Shifted(0.3))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_laws_are_laws(law):
    u = jnp.linspace(0, 1, 301)
    t = np.asarray(law.quantile(u))
    assert (np.diff(t) >= -1e-6).all() and t.min() >= 0 and t.max() <= 1
    assert t[0] < 0.04 and t[-1] > 0.95


def test_laws_have_the_quantiles_of_their_papers():
    # The median of a logit-normal is the sigmoid of its mean, deviations in logits.
    law = LogitNormal(0.8, 0.8)
    got = law.quantile(jnp.array([0.5, 0.841344746]))
    np.testing.assert_allclose(jnp.log(got / (1 - got)), [0.8, 1.6], rtol=1e-5)
    # SD3's mode law is stated for u ~ U(0, 1), whose mirror image has the same law.
    u = np.linspace(0, 1, 11)
    stated = 1 - u - 1.29 * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    np.testing.assert_allclose(Mode(1.29).quantile(jnp.array(u)), stated[::-1], atol=1e-6)
    # LightningDiT shifts by 0.3 in a time whose 1 is data.
    theirs = 0.3 * u / (1 + (0.3 - 1) * u)
    np.testing.assert_allclose(
        1 - Shifted(1 / 0.3).quantile(jnp.array(1 - u)), theirs, atol=1e-6
    )


def test_times_lie_in_strata_of_any_number():
    for n in (1, 49):
        found = np.sort(np.asarray(times(jax.random.key(n), n)))
        assert ((found * n).astype(int) == np.arange(n)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_the_best_guess_of_normal_data_errs_as_is_known(kind, target):
    """x ~ N(0, s^2): the error of the best guess, by float64 quadrature over time."""
    s, least = 0.5, 0.05

    def best(at, t):
        t = t[:, None]
        variance = ((1 - t) * s) ** 2 + t**2
        x, e = (1 - t) * s**2 / variance * at, t / variance * at
        return {"velocity": e - x, "noise": e, "data": x}[kind]

    t = (np.arange(4000) + 0.5) / 4000
    far, near = np.maximum(1 - t, least), np.maximum(t, least)
    left = (t * s) ** 2 / (((1 - t) * s) ** 2 + t**2)  # The variance of x, given x_t.
    said = {"velocity": left / t**2, "noise": left * ((1 - t) / t) ** 2, "data": left}
    slope = {
        "velocity": {"velocity": 1, "noise": 1 - t, "data": t},
        "noise": {"velocity": 1 + t / far, "noise": 1, "data": t / far},
        "data": {"velocity": 1 + (1 - t) / near, "noise": (1 - t) / near, "data": 1},
    }
    x = s * jax.random.normal(jax.random.key(0), (4096, 8))
    reading = Reading(kind, Linear(), least)
    run = jax.jit(lambda key: flow.loss(best, x, key, reading=reading, target=target)[0])
    found = np.mean([run(jax.random.key(i)) for i in range(4)])
    assert found == pytest.approx((said[kind] * slope[kind][target] ** 2).mean(), rel=0.02)


def call(variables, x, t, label, train=False, rngs=None):
    extra = jnp.full((*x.shape[:-1], 1), 9.0)
    said = variables["params"] * x + label[:, None, None, None]
    return jnp.concatenate([said, extra], -1)  # A variance, which is left out.


def test_padding_weighs_nothing_and_more_channels_are_left_out(key):
    x = jnp.zeros((8, 2, 2, 1))
    batch = {"image": x, "label": jnp.full(8, 3)}
    objective = Flow(Classes(4))
    assert [a.shape for a in objective.arguments(*batch.values())] == [x.shape, (8,), (8,)]

    weight = jnp.array([1.0] * 4 + [0.0] * 4)
    broken = batch | {"image": x.at[4:].set(jnp.nan), "weight": weight}
    found = objective.measure(call, 1.0, broken, key)["loss"]
    assert found.count == 4 and np.isfinite(found.sum)
    assert np.isfinite(objective.loss(call, 1.0, broken, key)[0])
    assert objective.velocity(functools.partial(call, {"params": 1.0}, label=jnp.zeros(8)))(
        x, jnp.ones(8)
    ).shape == (8, 2, 2, 1)


def data(classes):
    return types.SimpleNamespace(source=types.SimpleNamespace(num_classes=classes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classes(0), "classes.count=0 must be 1 or more"),
        (lambda: Mode(3.0), r"scale=3.0 must lie"),
        (lambda: Shifted(0.0), "shift=0.0 must be above 0"),
        (lambda: known(jnp.array([1, 12]), Classes(10)), "class 12 is outside the table of 10"),
        (lambda: known(jnp.array([-1]), Classes(10)), "class -1 is outside the table"),
        (lambda: known(jnp.array([1]), None), "the objective has no classes"),
        (
            lambda: Flow(Classes(10)).check(types.SimpleNamespace(num_classes=9), data(10)),
            "model.num_classes=9; set model.num_classes=10",
        ),
        (
            lambda: Flow(Classes(9)).check(types.SimpleNamespace(num_classes=9), data(10)),
            "has 10 classes, more than objective.classes.count=9",
        ),
    ],
)
def test_what_cannot_be_is_told(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_kinds_are_checked(unchecked):
    with pytest.raises(InputError, match="kind='x0' must be one of"):
        Reading("x0")  # pyright: ignore
    with pytest.raises(InputError, match="target='v' must be one of"):
        Flow(target="v").check(None, data(1))  # pyright: ignore
