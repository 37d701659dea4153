"""The first stage's losses: formulas, what is no negative, and a model that learns them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.errors import InputError
from jaxformer.experiment import Objective
from jaxformer.objectives.image_text import ImageText, contrast, cosines, negatives
from tests.models import test_qformer


def test_an_image_is_as_near_as_its_nearest_query():
    image = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    text = jnp.array([[0.6, 0.8], [1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(cosines(image, text), [[0.8, 1.0, 0.0]], atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_contrast_is_cross_entropy_both_ways(smoothing, key):
    logits = jax.random.normal(key, (5, 5))
    real = jnp.array([True, True, False, True, True])
    some = np.asarray(logits, np.float64)[np.ix_(real, real)]
    targets = np.eye(4) * (1 - smoothing) + smoothing / 4
    logs = (some - np.log(np.exp(some).sum(1, keepdims=True))) * targets
    logs += (some - np.log(np.exp(some).sum(0, keepdims=True))) * targets
    found = contrast(logits, real, smoothing)
    assert found[2] == 0
    np.testing.assert_allclose(found.sum(), -logs.sum() / 2, rtol=1e-6)


def test_negatives_are_drawn_by_nearness_and_never_a_pair(key):
    logits = jnp.log(jnp.array([[9.0, 1, 3], [2, 9, 2], [0, 1, 9]]))
    other = ~jnp.eye(3, dtype=bool)
    texts, images = jax.vmap(lambda k: negatives(logits, other, k))(jax.random.split(key, 4000))
    assert (texts != jnp.arange(3)[None]).all() and (images != jnp.arange(3)[None]).all()
    assert abs((texts[:, 0] == 2).mean() - 0.75) < 0.03
    assert abs((images[:, 0] == 1).mean() - 1.0) < 1e-6  # The other has a probability of 0.
    assert abs((images[:, 1] == 2).mean() - 0.5) < 0.03
    nearest = negatives(logits, other)
    np.testing.assert_array_equal(nearest[0], [2, 0, 1])
    np.testing.assert_array_equal(nearest[1], [1, 0, 0])


def batch(texts=((1, 5, 6, 0), (1, 7, 0, 0), (1, 5, 6, 0), (1, 8, 9, 10))):
    images = jax.random.normal(jax.random.key(3), (len(texts), 4, 8, 3))
    return {"image": images, "tokens": jnp.array(texts)}


@functools.cache
def measured():
    objective = ImageText()
    return jax.jit(
        lambda p, b: objective.measure(test_qformer.MODEL.apply, p, b, jax.random.key(0))
    )


@pytest.mark.slow
def test_padding_and_rows_of_weight_0_count_for_nothing():
    """And a text that another row has too is no negative."""
    params, run = test_qformer.params(), measured()
    found = run(params, batch())
    assert int(found["contrast"].count) == 4
    assert int(found["matching"].count) == 12
    assert int(found["writing"].count) == 2 + 1 + 2 + 3
    rows = batch()
    rows["image"] = rows["image"].at[3].set(1e3)
    rows |= {"weight": jnp.array([1.0, 1, 1, 0])}
    less = run(params, rows)
    other = rows | {"tokens": rows["tokens"].at[3].set(jnp.array([1, 4, 4, 4]))}
    for name, metric in run(params, other).items():
        np.testing.assert_allclose(metric.sum, less[name].sum, rtol=1e-6)
    alike = run(params, batch(((1, 5, 6, 0),) * 4))
    assert int(alike["matching"].count) == 4  # The pairs alone.


@pytest.mark.slow
def test_a_model_learns_all_three(key):
    model, objective = test_qformer.MODEL, ImageText(smoothing=0.0)
    assert isinstance(objective, Objective)
    data, tx = (
        batch(((1, 5, 6, 0), (1, 7, 0, 0), (1, 6, 5, 0), (1, 8, 9, 10))),
        optax.adam(3e-3),
    )

    @jax.jit
    def step(params, state, key):
        loss = functools.partial(objective.loss, model.apply)
        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(params, data, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, found

    params = test_qformer.fresh()
    state, curve = tx.init(params), []
    for i in range(150):
        params, state, found = step(params, state, jax.random.fold_in(key, i))
        curve.append(found)
    first, last = curve[0], curve[-1]
    assert first["matching"] == pytest.approx(np.log(2), abs=0.3)
    assert last["contrast"] < 0.1 and last["writing"] < 0.1
    assert last["matching"] < 0.5  # By the hardest of four images: it comes last.
    right = measured()(params, data)
    assert right["contrast_accuracy"].value() == right["writing_accuracy"].value() == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"smoothing": 1.0}, "smoothing=1.0 must be"),
        ({"factors": (1.0, 1.0)}, "three numbers"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(InputError, match=said):
        ImageText(**fields)
