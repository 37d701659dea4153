"""Schedules against their closed forms, and AdamW against what its paper says."""

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxformer.muon
import jaxformer.optim
from jaxformer.errors import InputError
from jaxformer.optim import WSD, AdamW, Constant, Cosine, Rsqrt, Schedule

STEPS = 1000


def half_cosine(step):
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 100) / 900)) / 2


CLOSED_FORMS = [
    (Constant(0.3), {0: 0.3, 7: 0.3, 1000: 0.3, 2000: 0.3}),
    (Constant(0.3, warmup=10), {0: 0, 5: 0.15, 10: 0.3, 1000: 0.3}),
    (Cosine(1.0, 100, 0.1), {0: 0, 50: 0.5, 100: 1, 550: 0.55, 1000: 0.1, 1100: 0.1}),
    (Cosine(1.0, 0.1, 0.1), {step: half_cosine(step) for step in (100, 123, 700, 999)}),
    (Cosine(2.0, 0), {0: 2, 500: 1, 1000: 0}),
    (
        WSD(2.0, 100, 0.2, 0.5),
        {0: 0, 50: 1, 100: 2, 800: 2, 900: 1.25, 1000: 0.5, 1500: 0.5},
    ),
    (WSD(2.0, 0, 1.0), {0: 2, 250: 1.5, 1000: 0}),
    (WSD(2.0, 0, 0), {0: 2, 999: 2, 1000: 2}),
    (
        Rsqrt(3.0, 100, 300, 0),
        {0: 0, 50: 1.5, 100: 3, 400: 3 / math.sqrt(2), 1000: 1.5},
    ),
    (Rsqrt(3.0, 100, 0.3, 0.1), {900: 3 * math.sqrt(300 / 1100), 1000: 0, 1200: 0}),
    (Rsqrt(3.0, 100, 300, 200), {900: 1.5 * math.sqrt(300 / 1100)}),
]


@pytest.mark.parametrize(("rate", "values"), CLOSED_FORMS, ids=repr)
def test_closed_form(rate, values):
    assert isinstance(rate, Schedule)
    made = rate.make(STEPS)
    for step, value in values.items():
        np.testing.assert_allclose(made(step), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rate", [rate for rate, _ in CLOSED_FORMS], ids=repr)
def test_continuous_under_jit(rate):
    """No step jumps by more than the steepest of the lines, and ends are exact."""
    made = jax.jit(jax.vmap(rate.make(STEPS)))
    values = np.asarray(made(jnp.arange(STEPS + 2)))
    start = 1 if getattr(rate, "warmup", 0) else 0
    steepest = rate.peak / 10
    assert np.abs(np.diff(values)).max() <= steepest * (1 + 1e-5)
    assert values.dtype == np.float32
    assert values.max() == np.float32(rate.peak)
    assert values[0] == (0 if start else np.float32(rate.peak))
    end = {Constant: rate.peak}.get(type(rate), getattr(rate, "floor", 0.0))
    if all(getattr(rate, part, 1) for part in ("decay", "cooldown")):
        assert values[-1] == values[-2] == np.float32(end)


def test_cosine_is_that_of_optax():
    ours = Cosine(3e-4, warmup=100, floor=3e-5).make(STEPS)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 100, STEPS, 3e-5)
    steps = jnp.arange(0, STEPS + 1, 7)
    np.testing.assert_allclose(
        jax.vmap(ours)(steps), jax.vmap(theirs)(steps), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize(
    ("rate", "says"),
    [
        (Cosine(1.0, warmup=2000), "warmup=2000 do not fit into a run of 1000"),
        (WSD(1.0, warmup=0.6, decay=0.5), "warmup=0.6 and decay=0.5 do not fit"),
        (Constant(1.0, warmup=1.5), "warmup=1.5 is no fraction"),
        (Constant(1.0, warmup=-1), "warmup=-1 must not be negative"),
        (Cosine(3e-4, floor=0.1), "floor=0.1 is a rate"),
    ],
)
def test_refuses(rate, says):
    with pytest.raises(InputError, match=says):
        rate.make(STEPS)


AXES = {
    "head": {"kernel": P("embed", "vocab"), "bias": P("vocab")},
    "norm": {"scale": P("embed")},
    "query": {
        "kernel": P("embed", "heads", "head_dim"),
        "bias": P("heads", "head_dim"),
    },
    "token": {"embedding": P("vocab", "embed")},
}
SHAPES = {
    "head": {"kernel": (4, 3), "bias": (3,)},
    "norm": {"scale": (4,)},
    "query": {"kernel": (4, 2, 2), "bias": (2, 2)},
    "token": {"embedding": (5, 4)},
}


def normal(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_adamw_first_step_is_one_rate():
    """1.0 x rate, whatever the gradient; NAdamW would take 1.47 x rate."""
    grads = normal(0)
    tx = AdamW(Constant(0.01), decay=0.0).make(AXES, STEPS)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(u, -0.01 * jnp.sign(g), rtol=1e-4),
        updates,
        grads,
    )


def test_adamw_is_its_equations():
    rate, b1, b2, eps, decay = Cosine(0.1, 2), 0.8, 0.9, 1e-6, 0.3
    tx = AdamW(rate, b1, b2, eps, decay, clip=None).make(AXES, 10)
    params = normal(1)
    state, update = tx.init(params), jax.jit(tx.update)
    p = np.asarray(params["query"]["kernel"], np.float64)
    m = v = 0.0
    for step in range(6):
        grads = normal(10 + step)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        g = np.asarray(grads["query"]["kernel"], np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        mean, square = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
        p = p - float(rate.make(10)(step)) * (mean / (np.sqrt(square) + eps) + decay * p)
    np.testing.assert_allclose(params["query"]["kernel"], p, rtol=1e-5, atol=1e-6)


def test_decay_acts_on_kernels_and_embeddings_only():
    """With no gradient what is left is the decay: decoupled, times the rate."""
    params = normal(2)
    tx = AdamW(Constant(0.1), decay=0.5).make(AXES, STEPS)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    for path, update in jax.tree.leaves_with_path(updates):
        decayed = path[-1].key in ("kernel", "embedding")
        param = params[path[0].key][path[1].key]
        np.testing.assert_allclose(update, -0.05 * decayed * param, rtol=1e-6)


def test_clips_by_the_norm_of_all_leaves():
    """Adam's first mean is (1 - b1) times what it was given."""
    grads = normal(3)
    norm = optax.tree.norm(grads)
    for clip, size in ((0.5, 0.5), (1e3, norm), (None, norm)):
        tx = AdamW(Constant(0.1), clip=clip).make(AXES, STEPS)
        _, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
        mean = optax.tree.norm(optax.tree.get(state, "mu"))
        np.testing.assert_allclose(mean, 0.1 * size, rtol=1e-5)


def test_mu_dtype_is_of_the_mean_alone():
    params = normal(4)
    tx = AdamW(Constant(0.1), mu_dtype="bfloat16").make(AXES, STEPS)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    dtypes = {
        name: {str(x.dtype) for x in jax.tree.leaves(tree)}
        for name, tree in (
            ("mu", optax.tree.get(state, "mu")),
            ("nu", optax.tree.get(state, "nu")),
            ("updates", updates),
        )
    }
    assert dtypes == {"mu": {"bfloat16"}, "nu": {"float32"}, "updates": {"float32"}}


def test_not_finite_is_not_hidden():
    """No apply_if_finite: after enough bad steps it applies one, unseen."""
    params = normal(5)
    tx = AdamW(Constant(0.1)).make(AXES, STEPS)
    grads = jax.tree.map(lambda x: x.at[0].set(jnp.nan), params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert not any(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("module", [jaxformer.optim, jaxformer.muon])
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
