"""Models that see images as large as they are: rows of samples, and counts that do not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_vlm import same_gradients
from tests.parity import native
from tests.parity.case import TOLERANCE
from tests.parity.test_parity import jit, load

CASE = next(case for case in native.CASES if case.name == "qwen2_5_vl")


@functools.cache
def answers():
    inputs, theirs = CASE.answers()
    return {name: jnp.asarray(x) for name, x in inputs.items()}, theirs["logits"]


def packed():
    """Both samples in one row, and padding after each: tokens, and all else by name."""
    found, _ = answers()
    lengths = (11, found["tokens"].shape[1])
    pad = jnp.full(3, native.TEXT["bos_token_id"])
    parts = [
        part for row, n in zip(found["tokens"], lengths, strict=True) for part in (row[:n], pad)
    ]
    segments = np.repeat([1, 0, 2, 0], [lengths[0], 3, lengths[1], 3])
    sizes = np.asarray(found["grids"]).prod(-1)
    patches = [row[:n] for row, n in zip(found["patches"], sizes.sum(1), strict=True)]
    patches.append(jnp.full((4, patches[0].shape[1]), jnp.nan))  # Which nobody looks at.
    there = sizes.reshape(-1) > 0
    more = {
        "patches": jnp.concatenate(patches),
        "grids": found["grids"].reshape(-1, 3)[there],
        "seconds": found["seconds"].reshape(-1)[there],
        "segments": jnp.asarray(segments),
    }
    where = np.flatnonzero(segments == 1), np.flatnonzero(segments == 2)
    return jnp.concatenate(parts)[None], {n: x[None] for n, x in more.items()}, where


@pytest.mark.slow
def test_samples_in_a_row_are_as_each_alone():
    model, params = load(CASE.name)
    tokens, more, where = packed()
    found = jit(model.apply)({"params": params}, tokens, **more)[0]
    for row, own in enumerate(where):
        whole = answers()[1][row, : len(own)]
        np.testing.assert_allclose(found[own], whole, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_gradients_of_samples_in_a_row_are_those_of_each_alone():
    model, params = load(CASE.name)
    tokens, more, where = packed()
    draw = np.random.default_rng(0)
    weights = [jnp.asarray(draw.normal(size=(len(own), 19)), "float32") for own in where]

    def together(params):
        found = model.apply({"params": params}, tokens, **more)[0]
        return sum((found[own] * w).sum() for own, w in zip(where, weights, strict=True))

    def alone(params):
        found = CASE.ours(model, {"params": params}, answers()[0])["logits"]
        return sum((row[: len(w)] * w).sum() for row, w in zip(found, weights, strict=True))

    same_gradients(*(jit(jax.grad(f))(params) for f in (together, alone)))


def test_counts_that_do_not_fit_are_told():
    model, params = load(CASE.name)
    found, _ = answers()
    few = found["tokens"].at[1, 2].set(3)
    with pytest.raises(ValueError, match=r"row 1 has 13 image .* \[\(1, 1, 2\), \(2, 2, 3\)\]"):
        model.apply({"params": params}, few, found["patches"], found["grids"])


@pytest.mark.slow
def test_a_row_whose_counts_do_not_fit_is_nan_where_it_is_traced():
    model, params = load(CASE.name)
    found, _ = answers()
    few = found["tokens"].at[1, 2].set(3)
    seen = (found["patches"], found["grids"])
    traced = jit(lambda tokens: model.apply({"params": params}, tokens, *seen))(few)
    assert np.isnan(traced[1]).all()
    assert not np.isnan(traced[0]).any()


@pytest.mark.usefixtures("unchecked")
def test_patches_that_do_not_fit_are_told():
    model, params = load(CASE.name)
    found, _ = answers()
    variables = {"params": params}
    for patches, grids, words in (
        (found["patches"][..., :-1], found["grids"], "patches have 23 numbers"),
        (found["patches"][:, :-2], found["grids"], "62 patches must be a multiple of 4"),
        (found["patches"][:, :8], found["grids"], "8 patches cannot hold images of 56"),
        (found["patches"], found["grids"] + 1, "side=2 must divide"),
    ):
        with pytest.raises(ValueError, match=words):
            model.apply(variables, patches, grids, method=lambda m, *x: m.vision.encode(*x))
