import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.objectives.condition import Classes
from jaxformer.samplers.guidance import NONE, Guidance

CLASSES = Classes(3)
X = jax.random.normal(jax.random.key(0), (2, 2, 2, 4))
LABEL = jnp.array([0, 2])


def says(x, t, label):
    """Something that no two rows, times, labels or channels share; and a variance."""
    said = x * (1 + label + 0.5 * t)[:, None, None, None]
    return jnp.concatenate([said, 2 * said], -1)


@pytest.mark.parametrize("scale", [1.0, 0.0, 4.0])
@pytest.mark.parametrize("channels", [None, 3])
def test_it_goes_away_from_what_is_said_of_none(scale, channels):
    t = jnp.array([0.2, 0.7])
    found = Guidance(scale, channels).of(says, LABEL, CLASSES)(X, t)
    its, none = says(X, t, LABEL), says(X, t, jnp.full(2, 3))
    C = 4 if channels is None else channels
    np.testing.assert_allclose(
        found[..., :C], (none + scale * (its - none))[..., :C], rtol=1e-5, atol=1e-6
    )
    # DiT's own: with 3 of 4 channels guided the fourth, and the variance, are the class's.
    np.testing.assert_allclose(found[..., C:], its[..., C:], rtol=1e-6)


def test_an_interval_of_time():
    guide = Guidance(3.0, first=0.3, last=0.8).of(says, LABEL, CLASSES)
    plain = NONE.of(says, LABEL, CLASSES)
    for t, same in ((0.1, True), (0.29, True), (0.5, False), (0.81, True)):
        t = jnp.full(2, t)
        assert np.allclose(guide(X, t), plain(X, t), atol=1e-5) is same


def test_no_guidance_asks_once_and_no_class_is_asked_without():
    rows = []

    def count(x, t, label):
        rows.append(len(x))
        return x

    NONE.of(count, LABEL, CLASSES)(X, jnp.ones(2))
    Guidance(2.0).of(count, LABEL, CLASSES)(X, jnp.ones(2))
    assert rows == [2, 4]
    assert (NONE.of(lambda x, t: x, None, None)(X, jnp.ones(2)) == X).all()


def model(**fields):
    return types.SimpleNamespace(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guidance(2.0).check(None, None), "needs a null label, and the objective has"),
        (
            lambda: Guidance(2.0).check(model(label_dropout=0.0), CLASSES),
            "needs a null label, and with model.label_dropout=0 none was learned",
        ),
        (
            lambda: NONE.of(says, jnp.array([1, 7]), CLASSES),
            "class 7 is outside the table of 3",
        ),
        (lambda: Guidance(2.0, first=0.7, last=0.3), "must be part of"),
    ],
)
def test_what_cannot_be_is_told(make, message):
    with pytest.raises(InputError, match=message):
        make()
    NONE.check(model(label_dropout=0.0), None)
