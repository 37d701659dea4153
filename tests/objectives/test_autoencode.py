import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.metrics import merge, to_host
from jaxformer.models.vae import Critic, Judged, KLAutoencoder, VQAutoencoder
from jaxformer.objectives.autoencode import (
    Autoencode,
    commitment,
    divergence,
    hinge,
    likeness,
    uses,
)

TINY = {"widths": (4, 4), "depth": 1, "channels": 1, "groups": 2, "looks": False}


def test_divergence_is_the_closed_form_of_a_normal_law():
    mean, deviation = 0.7, 1.6
    x = np.linspace(-20, 20, 200_001)
    p = np.exp(-(((x - mean) / deviation) ** 2) / 2) / deviation / np.sqrt(2 * np.pi)
    log_ratio = -(((x - mean) / deviation) ** 2) / 2 - np.log(deviation) + x**2 / 2
    expected = np.trapezoid(p * log_ratio, x)
    found = divergence(jnp.full((2, 3), mean), jnp.full((2, 3), 2 * np.log(deviation)))
    np.testing.assert_allclose(found, 3 * expected, rtol=1e-5)


def test_commitment_moves_codes_most():
    given, chosen = jnp.zeros((1, 1, 1, 2)), jnp.full((1, 1, 1, 2), 3.0)
    to_given, to_chosen = jax.grad(lambda a, b: commitment(a, b, 0.25).sum(), (0, 1))(
        given, chosen
    )
    np.testing.assert_allclose(to_chosen, 3.0)  # 2 (3 - 0) / 2 numbers.
    np.testing.assert_allclose(to_given, -0.75)


def test_codes_in_use_are_counted_over_batches():
    a = uses(jnp.array([[[0, 1]], [[0, 1]]]), 4)
    b = uses(jnp.array([[[2, 3]], [[2, 2]]]), 4, jnp.array([1.0, 0.0]))
    both = to_host(merge(a, b))
    np.testing.assert_array_equal(both.sum, [2, 2, 1, 1])
    assert both.count == 6
    assert both.value() == pytest.approx(
        np.exp(-sum(p * np.log(p) for p in (1 / 3, 1 / 3, 1 / 6, 1 / 6)))
    )


def test_likeness_does_not_see_scale(key):
    a = jax.random.normal(key, (2, 3, 3, 4))
    b = a.at[1].multiply(-1.0)
    np.testing.assert_allclose(likeness(lambda x: 5 * x, a, 3 * b), [0, 4], atol=1e-5)


def test_hinge_is_nothing_for_a_critic_that_is_sure():
    real, made = jnp.array([[1.5], [0.0]]), jnp.array([[-1.5], [0.0]])
    np.testing.assert_allclose(hinge(real, made), [0, 1])


@pytest.mark.slow
def test_the_critic_and_the_autoencoder_learn_against_each_other_in_one_step(key):
    model = Judged(VQAutoencoder(**TINY, latent=2, codes=5), Critic(4, 1, groups=2))
    batch = {"image": jax.random.normal(key, (2, 8, 8, 1)), "weight": jnp.array([1.0, 0.0])}
    objective = Autoencode(adversarial=0.5)
    only = Autoencode(adversarial=0.0)

    @jax.jit
    def run(params):
        def grads(objective):
            return jax.grad(lambda p: objective.loss(model.apply, p, batch, key)[0])(params)

        def critic(params):
            made = model.apply({"params": params}, batch["image"])[0]
            judged = [
                model.apply({"params": params}, x, method="judge")[:1]
                for x in (batch["image"], jax.lax.stop_gradient(made))
            ]
            return hinge(*judged)[0]

        return grads(objective), grads(only), jax.grad(critic)(params)

    params = nn.unbox(jax.jit(model.init)(key, batch["image"]))["params"]
    with_critic, without, critic = run(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        with_critic["critic"],
        critic["critic"],
    )
    decoder = (with_critic["autoencoder"]["decoder"], without["autoencoder"]["decoder"])
    far = jax.tree.map(lambda a, b: np.abs(a - b).max(), *decoder)
    assert max(jax.tree.leaves(far)) > 0


@pytest.mark.slow
def test_the_critics_weight_is_balanced_in_the_last_kernel(key):
    """As if it had been the constant that the two gradients ask for."""
    model = Judged(VQAutoencoder(**TINY, latent=2, codes=5), Critic(4, 1, groups=2))
    batch = {"image": jax.random.normal(key, (2, 8, 8, 1)), "weight": jnp.array([1.0, 0.0])}
    params = nn.unbox(jax.jit(model.init)(key, batch["image"]))["params"]

    def run(objective):
        return jax.grad(lambda p: objective.loss(model.apply, p, batch, key), has_aux=True)

    @jax.jit
    def slopes(params):
        def term(name):
            def one(p):
                made, _ = model.apply({"params": p}, batch["image"])
                if name == "error":
                    return ((made - batch["image"]) ** 2)[0].mean()
                return -model.apply({"params": params}, made, method="judge")[0].mean()

            return jax.grad(one)(params)["autoencoder"]["decoder"]["end"]["kernel"]

        error, fooled = (jnp.linalg.norm(term(n).ravel()) for n in ("error", "fooled"))
        return run(Autoencode(adversarial=0.5, adaptive=True))(params), error / (fooled + 1e-4)

    (grads, means), wanted = slopes(params)
    np.testing.assert_allclose(means["balance"], wanted, rtol=1e-4)
    assert abs(float(wanted) - 1) > 0.1
    constant, _ = jax.jit(run(Autoencode(adversarial=0.5 * float(wanted))))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, constant
    )


def test_measures_leave_out_padding(key):
    model = KLAutoencoder(**TINY, latent=2)
    images = jax.random.normal(key, (3, 4, 4, 1))
    params = jax.jit(model.init)(key, images)["params"]
    measure = jax.jit(lambda batch: Autoencode().measure(model.apply, params, batch, key))
    padded = {"image": images.at[2].set(jnp.nan), "weight": jnp.array([1.0, 1.0, 0.0])}
    found, alone = measure(padded), measure({"image": images[:2]})
    for name in ("error", "divergence"):
        np.testing.assert_allclose(found[name].sum, alone[name].sum, rtol=1e-5)
        assert found[name].count == alone[name].count == 2


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Autoencode(adversarial=1.0), "needs a critic; make the model a models.vae.Judged"),
        (Autoencode(perceptual=1.0), "needs features="),
    ],
)
def test_what_nobody_can_judge_is_refused(objective, message):
    with pytest.raises(InputError, match=message):
        objective.check(KLAutoencoder(**TINY), None)
