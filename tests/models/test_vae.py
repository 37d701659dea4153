import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models.vae import (
    Codebook,
    Critic,
    KLAutoencoder,
    VQAutoencoder,
    flops,
    named,
)

TINY = {"widths": (4, 8), "depth": 1, "channels": 2, "groups": 2}


def shapes(model, *inputs):
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# diffusers' counts of the parameters of these configs.
COUNTS = {"sd": 83_653_863, "sdxl": 83_653_863, "sd3": 83_819_683}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert count(shapes(named(name), jnp.zeros((1, 16, 16, 3)))) == COUNTS[name]


def test_latents_are_a_draw_less_the_shift_times_the_scale_and_go_back(key):
    model = KLAutoencoder(**TINY, latent=3, scale=0.5, shift=0.25)
    images = jax.random.normal(key, (2, 4, 6, 2))

    @jax.jit
    def run(params):
        def apply(method, *inputs):
            return model.apply({"params": params}, *inputs, method=method)

        law, latents = apply("posterior", images), apply("encode", images)
        drawn = apply("encode", images, key)
        again = apply("decode", latents), apply("__call__", images)[0]
        return law, latents, drawn, again

    law, latents, drawn, (again, same) = run(jax.jit(model.init)(key, images)["params"])
    assert latents.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(latents, (law.mean - 0.25) * 0.5, atol=1e-6)
    noise = jax.random.normal(key, law.mean.shape)
    expected = (law.mean + jnp.exp(law.log_variance / 2) * noise - 0.25) * 0.5
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    assert again.shape == images.shape
    np.testing.assert_allclose(again, same, atol=1e-5)


def test_a_code_is_the_nearest_and_hands_its_gradient_on(key):
    book = Codebook(5, 3)
    z = jax.random.normal(key, (2, 2, 2, 3))
    table = jax.random.normal(jax.random.key(1), (5, 3))

    @jax.jit
    def run(z, table):
        def value(z, table):
            codes = book.apply({"params": {"embedding": table}}, z)
            return (codes.vectors * jnp.arange(24.0).reshape(z.shape)).sum(), codes

        return jax.grad(value, (0, 1), has_aux=True)(z, table)

    (dz, dtable), codes = run(z, table)
    far = ((z[..., None, :] - table[None, None, None]) ** 2).sum(-1)
    np.testing.assert_array_equal(codes.ids, far.argmin(-1))
    np.testing.assert_allclose(codes.vectors, table[codes.ids], atol=1e-6)
    np.testing.assert_array_equal(dz, jnp.arange(24.0).reshape(z.shape))
    assert not dtable.any()
    ids = jnp.array([[[4, 5, -1]]])
    found = book.apply({"params": {"embedding": table}}, ids, method="look_up")
    np.testing.assert_array_equal(found[0, 0, 0], table[4])
    assert np.isnan(found[0, 0, 1:]).all()


def test_ids_are_an_image_again(key):
    model = VQAutoencoder(**TINY, latent=4, codes=6, code_width=3)
    images = jax.random.normal(key, (2, 4, 6, 2))

    @jax.jit
    def run(params):
        given = {"params": params}
        ids = model.apply(given, images, method="encode")
        return ids, model.apply(given, ids, method="decode"), model.apply(given, images)[0]

    ids, again, whole = run(jax.jit(model.init)(key, images)["params"])
    assert ids.shape == (2, 2, 3)
    np.testing.assert_allclose(again, whole, atol=1e-5)


def test_a_critic_sees_patches():
    out = jax.eval_shape(
        lambda: Critic(8, 2, groups=2).init_with_output(
            jax.random.key(0), jnp.zeros((2, 32, 32, 3))
        )[0]
    )
    assert out.shape == (2, 6, 6)


def test_flops_are_those_of_the_convolutions():
    """Each kernel is used once for each place that it makes."""
    model = KLAutoencoder(**TINY, latent=3, looks=False, mixes=False)
    tree = shapes(model, jnp.zeros((1, 8, 8, 2)))

    def places(path):
        side, name = path[0], path[1]
        if side == "encoder":
            return 64 if name in ("start", "down_0_0") else 16
        return 16 if name in ("start", "middle", "up_0_0", "up_0_1") else 64

    total = 0
    for path, leaf in jax.tree.leaves_with_path(tree):
        keys = [k.key for k in path]
        if keys[-1] == "kernel":
            total += leaf.size * places(keys)
    assert flops(model, (8, 8, 2)) == 2 * total


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 5, 4, 2), "images of 5 x 4 must be multiples of 2"),
        ((1, 4, 4, 3), "images have 3 channels; the model takes 2"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        shapes(KLAutoencoder(**TINY), jnp.zeros(shape))


def test_latents_of_another_model_are_refused():
    model = KLAutoencoder(**TINY, latent=3)
    params = shapes(model, jnp.zeros((1, 4, 4, 2)))
    with pytest.raises(ValueError, match="latents have 4 channels; the model has 3"):
        jax.eval_shape(
            lambda p: model.apply({"params": p}, jnp.zeros((1, 2, 2, 4)), method="decode"),
            params,
        )
