"""Contrastive losses: the formula in float64, one device and eight, and their memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import sharding
from jaxformer.errors import InputError
from jaxformer.experiment import Objective
from jaxformer.metrics import merge, to_host
from jaxformer.objectives.contrast import Contrast, retrieval, sigmoid, softmax
from jaxformer.sharding import DATA_PARALLEL, FSDP_TENSOR, make_mesh

B, E, SCALE, BIAS = 16, 5, 7.0, -4.0
MESHES = ("data=8", "data=4,fsdp=2", "data=2,fsdp=2,tensor=2")


def embeddings(key, B=B, E=E):
    x = jax.random.normal(key, (2, B, E))
    x = x.at[1].add(x[0])
    return tuple(x / jnp.linalg.norm(x, axis=-1, keepdims=True))


def exact(link, image, text, scale, bias, real):
    """The loss of the rows that are real, and its gradients, all pairs at once."""
    x, y = (np.asarray(v, np.float64)[real] for v in (image, text))
    n, own = real.sum(), np.eye(real.sum())
    z = scale * x @ y.T + bias * (link == "sigmoid")
    if link == "softmax":
        rows, columns = (np.exp(z) / np.exp(z).sum(a, keepdims=True) for a in (1, 0))
        loss = -(np.log(rows) + np.log(columns))[own > 0].mean() / 2
        dz = (rows + columns - 2 * own) / (2 * n)
    else:
        loss = np.log1p(np.exp(np.where(own, -z, z))).sum() / n
        dz = (1 / (1 + np.exp(-z)) - own) / n
    dx, dy = np.zeros((2, *image.shape))
    dx[real], dy[real] = scale * dz @ y, scale * dz.T @ x
    dbias = dz.sum() * (link == "sigmoid")
    return loss, (dx, dy, (dz * (x @ y.T)).sum(), dbias)


def loss_of(link, chunk=None, weight=None):
    options = {"weight": weight} | ({} if chunk is None else {"chunk": chunk})

    def loss(image, text, scale, bias):
        if link == "softmax":
            return softmax(image, text, scale, **options) + 0 * bias
        return sigmoid(image, text, scale, bias, **options)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))


@pytest.mark.parametrize("chunk", [None, 1, 5, 16])
@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_equals_the_formula(link, chunk, key):
    x = embeddings(key)
    found = loss_of(link, chunk)(*x, SCALE, BIAS)
    expected = exact(link, *x, SCALE, BIAS, np.ones(B, bool))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_padding_is_not_there(link, key):
    real = np.arange(B) % 5 != 2
    image, text = embeddings(key)
    expected = exact(link, image, text, SCALE, BIAS, real)
    image, text = (jnp.where(real[:, None], x, jnp.nan) for x in (image, text))
    found = loss_of(link, 4, jnp.asarray(real, jnp.float32))(image, text, SCALE, BIAS)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    nothing = loss_of(link, 4, jnp.zeros(B))(image, text, SCALE, BIAS)
    chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, nothing))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_sharded_equals_unsharded(link, mesh, key):
    x = embeddings(key, 40)
    weight = (jnp.arange(40) % 7 != 3).astype(jnp.float32)
    expected = loss_of(link, weight=weight)(*x, SCALE, BIAS)
    mesh = make_mesh(mesh)
    with sharding.use(mesh, FSDP_TENSOR):
        x = jax.device_put(x, sharding.batch_sharding(mesh, FSDP_TENSOR))
        found = loss_of(link, 2, weight)(*x, SCALE, BIAS)
        text = loss_of(link, 2, weight).lower(*x, SCALE, BIAS).compile().as_text()
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)
    assert "collective-permute" in text and "all-gather" not in text


def test_a_batch_that_does_not_divide_is_named(key):
    x = embeddings(key, 12)
    with (
        sharding.use(make_mesh("data=8"), DATA_PARALLEL),
        pytest.raises(InputError, match="B of size 12 does not divide over data"),
    ):
        loss_of("softmax")(*x, SCALE, BIAS)


def dense(link):
    def loss(image, text, scale, bias):
        z = scale * jnp.matmul(image, text.T)
        if link == "softmax":
            lse = jax.nn.logsumexp(z, 1) + jax.nn.logsumexp(z, 0)
            return (lse / 2 - jnp.diag(z)).mean()
        sign = 1 - 2 * jnp.eye(z.shape[0])
        return jax.nn.softplus(sign * (z + bias)).sum() / z.shape[0]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_memory_does_not_grow_with_the_square_of_the_batch(link):
    mesh = make_mesh("data=8")

    def temporary(function, B):
        place = sharding.batch_sharding(mesh, DATA_PARALLEL)
        x = jax.ShapeDtypeStruct((B, 32), jnp.float32, sharding=place)
        number = jax.ShapeDtypeStruct((), jnp.float32)
        with sharding.use(mesh, DATA_PARALLEL):
            compiled = function.lower(x, x, number, number).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = (4096, 8192)
    ours = [temporary(loss_of(link, 64), B) for B in sizes]
    theirs = [temporary(dense(link), B) for B in sizes]
    print(f"{link}: bytes a device at batches of {sizes}: ours {ours}, dense {theirs}")
    assert ours[1] / ours[0] < 2.5 < 3.5 < theirs[1] / theirs[0]
    assert ours[1] < theirs[1] / 10


@pytest.mark.parametrize("mesh", [None, "data=4,fsdp=2"])
def test_retrieval_counts(mesh, key):
    image, text = embeddings(key, 24)
    text = text.at[3].set(text[4])  # Two texts alike: neither is found.
    weight = (jnp.arange(24) != 9).astype(jnp.float32)
    z = np.asarray(image @ text.T, np.float64)
    z[9], z[:, 9] = -9, -9
    own, rest = np.diag(z).copy(), np.where(np.eye(24) > 0, -9, z)
    real = np.arange(24) != 9
    by_image = (own > rest.max(1) + 1e-6)[real].sum()
    by_text = (own > rest.max(0) + 1e-6)[real].sum()

    def count():
        return jax.jit(lambda a, b, w: retrieval(a, b, weight=w, chunk=2))(image, text, weight)

    if mesh is None:
        found = count()
    else:
        with sharding.use(make_mesh(mesh), FSDP_TENSOR):
            found = count()
    assert [int(found[n].sum) for n in ("image_to_text", "text_to_image")] == [
        by_image,
        by_text,
    ]
    assert 0 < by_image < 23 and 0 < by_text < 23 and by_image != by_text
    assert {int(m.count) for m in found.values()} == {23}


def test_a_constant_or_broken_model_finds_nothing():
    for value in (0.5, jnp.nan):
        x = jnp.full((6, 4), value)
        assert all(m.value() == 0 for m in jax.jit(retrieval)(x, x).values())


def test_rows_that_are_equal_are_not_told_apart_by_rounding(key):
    x = embeddings(key, 64, 67)
    x = tuple(v.at[1::2].set(v[::2]) for v in x)
    assert all(m.value() == 0 for m in jax.jit(retrieval)(*x).values())


def apply(variables, image, tokens, *, train=False, rngs=None, method):
    """Two linear maps, as a model's encode."""
    assert method == "encode" and train == (rngs is not None)
    units = []
    for x, name in ((image.reshape(len(image), -1), "image"), (tokens, "text")):
        y = x @ variables["params"][name]
        units.append(y / jnp.linalg.norm(y, axis=-1, keepdims=True))
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    return *units, jnp.exp(scale), bias


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_the_objective(link, key):
    objective = Contrast(link, chunk=4)
    assert isinstance(objective, Objective) and objective.inputs == ("image", "tokens")
    keys = jax.random.split(key, 4)
    batch = {
        "image": jax.random.normal(keys[0], (B, 2, 2, 1)),
        "tokens": jax.random.normal(keys[1], (B, 3)),
    }
    params = {
        "image": jax.random.normal(keys[2], (4, E)),
        "text": jax.random.normal(keys[3], (3, E)),
        "scale": jnp.float32(1.5),
        "bias": jnp.float32(-1),
    }
    image, text, scale, bias = apply({"params": params}, *batch.values(), method="encode")
    expected = exact(link, image, text, scale, bias, np.ones(B, bool))[0]
    gradient = jax.value_and_grad(functools.partial(objective.loss, apply), has_aux=True)
    (loss, scalars), grads = jax.jit(gradient)(params, batch, key)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert set(scalars) == {"scale", "bias"} and float(scalars["bias"]) == -1
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))

    measure = jax.jit(functools.partial(objective.measure, apply))
    found = measure(params, batch, key)
    np.testing.assert_allclose(found["loss"].value(), expected, rtol=1e-5)
    padded = {n: jnp.pad(x, [(0, 4)] + [(0, 0)] * (x.ndim - 1)) for n, x in batch.items()}
    padded["weight"] = (jnp.arange(B + 4) < B).astype(jnp.float32)
    again = measure(params, padded, key)
    twice = merge(to_host(found), to_host(again))
    assert {int(m.count) for m in twice.values()} == {2 * B}
    for name, metric in twice.items():
        np.testing.assert_allclose(metric.value(), found[name].value(), rtol=1e-5)


def test_embeddings_of_half_precision_lose_no_more_than_their_rounding(key):
    image, text = (x.astype(jnp.bfloat16) for x in embeddings(key))
    for link in ("softmax", "sigmoid"):
        found, grads = loss_of(link)(image, text, SCALE, BIAS)
        expected, _ = exact(link, image, text, SCALE, BIAS, np.ones(B, bool))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert found.dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16


def test_a_chunk_of_none_is_refused(key):
    with pytest.raises(ValueError, match="chunk=0 must be 1 or more; 1024 is usual"):
        softmax(*embeddings(key), SCALE, chunk=0)
