"""MAE's loss: its definition by loops, padding, noise as data, and a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import sharding
from jaxformer.errors import InputError
from jaxformer.experiment import Objective
from jaxformer.objectives.reconstruct import Reconstruct, drawn, squared_error, targets
from jaxformer.ops.patches import patchify
from jaxformer.sharding import FSDP_TENSOR, make_mesh

B, PATCH, SHAPE = 8, 2, (8, 4, 6, 3)


def apply(variables, images, noise, *, train=False, rngs=None):
    """Sees the patches of least noise; says of each a linear map of their mean."""
    assert train == (rngs is not None)
    x = patchify(images, PATCH)
    mask = (noise.argsort(-1).argsort(-1) >= 2).astype(jnp.float32)
    seen = (x * (1 - mask)[..., None]).sum(1, keepdims=True) / 2
    place = jnp.arange(1.0, x.shape[1] + 1)[None, :, None]
    return place * (seen @ variables["params"]), mask


def example(key):
    keys = jax.random.split(key, 3)
    batch = {
        "image": jax.random.normal(keys[0], SHAPE) * 3 + 1,
        "noise": jax.random.uniform(keys[1], (B, 6)),
    }
    return batch, jax.random.normal(keys[2], (12, 12)) / 10


def by_loops(prediction, images, mask, normalize, weight):
    """From the definition, one patch at a time, in float64."""
    total = count = 0.0
    images = np.asarray(images, np.float64)
    for b, t in np.ndindex(mask.shape):
        y, x = divmod(t, SHAPE[2] // PATCH)
        here = images[b, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].ravel()
        if normalize:
            variance = ((here - here.mean()) ** 2).sum() / (here.size - 1)
            here = (here - here.mean()) / np.sqrt(variance + 1e-6)
        error = ((np.asarray(prediction[b, t], np.float64) - here) ** 2).mean()
        total += mask[b, t] * weight[b] * error
        count += mask[b, t] * weight[b]
    return total, count


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_definition(normalize, key):
    objective = Reconstruct(PATCH, normalize)
    assert isinstance(objective, Objective)
    batch, params = example(key)
    weight = np.array([1, 1, 0, 1, 1, 1, 1, 0])
    prediction, mask = apply({"params": params}, *batch.values())
    total, count = by_loops(prediction, batch["image"], mask, normalize, weight)
    broken = jnp.where(weight[:, None, None, None] > 0, batch["image"], jnp.nan)
    batch |= {"image": broken, "weight": jnp.asarray(weight, jnp.float32)}
    loss, _ = jax.jit(functools.partial(objective.loss, apply))(params, batch, key)
    np.testing.assert_allclose(loss, total / count, rtol=1e-5)
    found = objective.measure(apply, params, batch, key)["loss"]
    assert int(found.count) == count == 6 * 4
    np.testing.assert_allclose(found.value(), total / count, rtol=1e-5)


def test_normalised_patches_have_mean_0_and_variance_1(key):
    patches = 5 + 3 * jax.random.normal(key, (2, 3, 12))
    found = np.asarray(targets(patches))
    np.testing.assert_allclose(found.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(found.var(-1, ddof=1), 1, rtol=1e-5)
    np.testing.assert_allclose(drawn(jnp.asarray(found), patches), patches, atol=1e-5)
    np.testing.assert_array_equal(drawn(patches, 0 * patches, normalize=False), patches)
    flat = targets(jnp.full((1, 1, 4), 7.0))
    np.testing.assert_array_equal(flat, 0)
    with pytest.raises(ValueError, match="patches of one number have no variance"):
        targets(jnp.zeros((1, 2, 1)))


def test_a_perfect_prediction_loses_nothing_and_what_was_shown_does_not_count(key):
    patches = jax.random.normal(key, (2, 3, 12))
    mask = jnp.array([[1.0, 0, 0], [0, 1, 1]])
    target = targets(patches)
    wrong = target + 9 * (1 - mask)[..., None]
    assert float(squared_error(wrong, target, mask)[0]) == 0
    assert float(squared_error(wrong, target, 1 - mask)[0]) > 0


def test_noise_is_drawn_where_the_batch_has_none(key):
    objective = Reconstruct(PATCH)
    batch, params = example(key)
    fixed, drawn = batch, {"image": batch["image"]}
    run = lambda batch, seed: objective.loss(apply, params, batch, jax.random.key(seed))[0]  # noqa: E731
    assert run(fixed, 0) == run(fixed, 1)
    assert run(drawn, 0) == run(drawn, 0) != run(drawn, 1)


@pytest.mark.parametrize("noise", [True, False])
def test_sharded_equals_unsharded(noise, key):
    batch, params = example(key)
    batch = batch if noise else {"image": batch["image"]}
    loss = functools.partial(Reconstruct(PATCH).loss, apply)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = step(params, batch, key)
    mesh = make_mesh("data=4,fsdp=2")
    with sharding.use(mesh, FSDP_TENSOR):
        batch = jax.device_put(batch, sharding.batch_sharding(mesh, FSDP_TENSOR))
        found = step(params, batch, key)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_patches_of_another_size_than_the_models_are_refused():
    class Model:
        patch = 4

    Reconstruct(4).check(Model, None)
    with pytest.raises(InputError, match=r"objective.patch=2 is not model.patch=4; set"):
        Reconstruct(2).check(Model, None)
