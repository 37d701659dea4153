"""Every recorded original: outputs, gradients, what is saved again, and facts made wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import convert
from jaxformer.convert import files
from tests.parity.case import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    distance,
    gradient_distance,
    total,
)
from tests.parity.cases import CASES

# Little is computed here, so that compiling is what takes time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)
load = functools.cache(lambda name: convert.load(CASES[name].directory))


NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if case.slow else name
    for name, case in CASES.items()
]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_the_originals(name):
    case = CASES[name]
    inputs, theirs = case.answers()
    model, params = load(name)

    def answer(params, inputs):
        ours = case.ours(model, {"params": params}, inputs)
        return total(ours), ours

    if not case.gradients:
        _, ours = jit(answer)(params, inputs)
        assert distance(ours, theirs) <= TOLERANCE
        return
    (_, ours), grads = jit(jax.value_and_grad(answer, has_aux=True))(params, inputs)
    assert distance(ours, theirs) <= TOLERANCE
    assert gradient_distance(grads, case.gradient_of_theirs(model)) <= GRADIENT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.mutations])
def test_one_wrong_fact_is_noticed(name):
    """All facts of a case, one after the other: other numbers, or a refusal of the inputs."""
    case = CASES[name]
    inputs, theirs = case.answers()
    right, params = load(name)
    found = {}
    with jax.disable_jit():
        for fact, change in case.mutations.items():
            model, changed = change(right, dict(inputs))
            changed = jax.tree.map(jnp.asarray, changed)
            try:
                found[fact] = distance(case.ours(model, {"params": params}, changed), theirs)
            except ValueError as refusal:
                assert "image tokens" in str(refusal), fact
                found[fact] = float("inf")
    assert not {fact: far for fact, far in found.items() if far <= 2 * TOLERANCE}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_was_loaded(name, tmp_path):
    case = CASES[name]
    model, params = load(name)
    convert.save(tmp_path, model, params, kind=case.kind)
    before, after = (files.open_tensors(d) for d in (case.directory, tmp_path))
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key].read(), after[key].read())
    again, _ = convert.load(tmp_path)
    assert again == model


def test_every_recording_has_a_case():
    """And none is left of a case that is gone."""
    from tests.parity.case import RECORDED

    assert {p.name for p in RECORDED.iterdir()} == set(CASES)
