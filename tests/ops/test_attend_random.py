"""`attend` of lengths, heads and masks that hypothesis draws, against float64."""

import functools
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxformer.ops import chunked
from jaxformer.ops.attention import attend_lse
from jaxformer.ops.choose import Impl
from jaxformer.ops.mask import Mask
from tests.ops.exact import Exact
from tests.ops.random_masks import random_masks

B, H = 4, 8
LENGTHS = [(1, 1), (1, 6), (6, 1), (5, 7), (6, 6), (8, 8)]


@st.composite
def problems(draw, lengths=LENGTHS):
    """(T, S, N, K), a mask of them, a cap or None, and how many queries go at a time."""
    T, S = draw(st.sampled_from(lengths))
    K, shared = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    cap = draw(st.none() | st.just(1.5))
    return (T, S, K * shared, K), draw(random_masks(T, S, B)), cap, draw(st.integers(1, T))


def check_attend(impl: Impl, sizes, mask: Mask, cap: float | None, rows: int):
    """Output, logsumexp and gradients; what the mask tells to be padding holds NaN."""
    T, S, N, K = sizes
    draw = np.random.default_rng(0)
    shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, H)}
    x = {n: draw.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    d_out, d_lse = draw.normal(size=shapes["q"]), draw.normal(size=(B, N, T))
    seen = np.broadcast_to(mask.dense(T, S), (B, T, S))
    some, known = np.asarray(seen.any(2)), np.asarray(seen.any(1))
    d_lse = np.where(some[:, None], d_lse, 0)

    def solved(dtype):
        exact = Exact({n: a.astype(dtype) for n, a in x.items()}, seen, H**-0.5, cap)
        out, lse = exact.forward()
        grads = exact.backward(d_out.astype(dtype), d_lse.astype(dtype))
        return {"out": out, "lse": lse, **grads}

    def spoiled(a, shown):
        return np.where(shown[:, :, None, None] | (not mask.pads), a, np.nan).astype("f4")

    @jax.jit
    def run(q, k, v, mask, d):
        both = functools.partial(attend_lse, mask=mask, softcap=cap, impl=impl)
        (out, lse), pull = jax.vjp(both, q, k, v)
        return dict(zip(("out", "lse", *"qkv"), (out, lse, *pull(d)), strict=True))

    d = spoiled(d_out, some), jnp.asarray(d_lse, jnp.float32)
    q, k, v = spoiled(x["q"], some), spoiled(x["k"], known), spoiled(x["v"], known)
    with mock.patch.object(chunked, "LOGITS", rows * S):
        found = run(q, k, v, mask, d)
    usual, exact = solved(np.float32), solved(np.float64)
    for part, y in exact.items():
        finite, a = np.isfinite(y), np.asarray(found[part], np.float64)
        np.testing.assert_array_equal(np.isfinite(a), finite, err_msg=part)
        size = np.abs(y[finite]).max(initial=1)
        error = np.abs(usual[part][finite] - y[finite]).max(initial=0)
        close = 2 * error + 16 * np.finfo(np.float32).eps * size
        np.testing.assert_allclose(a[finite], y[finite], rtol=0, atol=close, err_msg=part)


def examples(count: int):
    """Each compiles a program of its own, so that none is made smaller where it fails."""
    return hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
    )


@examples(8)
@hypothesis.given(problems())
def test_any_mask_of_any_lengths_is_float64s(problem):
    check_attend("chunked", *problem)


@pytest.mark.slow
@examples(30)
@hypothesis.given(problems(), st.sampled_from(["chunked", "auto", "reference"]))
def test_many_masks_are_float64s(problem, impl):
    check_attend(impl, *problem)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["tpu", "gpu"])
@examples(6)
@hypothesis.given(problems([(1, 6), (5, 7), (6, 6), (8, 8)]))
def test_kernels_that_take_a_mask_are_float64s(impl, problem):
    """Interpreted; a mask that takes three ranges of keys they refuse, with that reason."""
    try:
        check_attend(impl, *problem)
    except NotImplementedError as error:
        assert "ranges of keys a query" in str(error)
