"""The TPU kernels, interpreted, against dense softmax attention.

What a block has outside of its array is NaN where the kernels are interpreted, so that any
such value that reached a result would show.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxformer.kernels import flash_tpu, flash_tpu_backward, tiles
from jaxformer.kernels.case import Case, Known
from tests.kernels.dense import Sizes, dense, differentiated, draw, side, spans, window

# Little is computed here, so that compiling is what takes time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)


def causal(T: int, past: int = 0):
    stop = jnp.arange(T) + past + 1
    return jnp.stack([jnp.zeros_like(stop), stop])[None]


def packed(*lengths: int):
    """Documents one after the other, each of which sees itself."""
    stop = np.repeat(np.cumsum(lengths), lengths)
    return jnp.asarray([[stop - np.repeat(lengths, lengths), stop]], jnp.int32)


def known(intervals):
    return {"intervals": intervals, "known": Known(np.asarray(intervals[0]))}


def everything(T: int, S: int, H: int, N: int, *, centered=False, **rest):
    return Case(
        side(0, T, H, True, centered, True, centered),
        side(5, S, H, True, False, True),
        slopes=2.0 ** -jnp.arange(1.0, N + 1),
        offset=S - T,
        scale=0.2,
        softcap=3.0,
        **rest,
    )


def plain(T: int, S: int, N: int, K: int, H: int, B: int = 1, **case):
    return Sizes(B, T, S, N, K, H), Case(scale=H**-0.5, **case)


CASES = {
    "plain": plain(40, 40, 2, 2, 64, B=2),
    "one": plain(1, 1, 2, 2, 64),
    "197": plain(197, 197, 2, 2, 64),
    "7 by 257": plain(7, 257, 2, 2, 64),
    "1025": plain(1025, 1025, 1, 1, 128),
    "size 32": plain(20, 24, 4, 4, 32),
    "size 72": plain(20, 24, 4, 4, 72, B=2),
    "size 72, 16 heads": plain(20, 24, 16, 16, 72),
    "size 80": plain(20, 24, 2, 2, 80),
    "size 96": plain(20, 24, 2, 2, 96),
    "size 128": plain(20, 24, 2, 2, 128, B=2),
    "size 256": plain(20, 24, 2, 2, 256),
    "3 heads": plain(20, 24, 3, 3, 64, B=2),
    "grouped 64": plain(20, 24, 4, 2, 64, B=2),
    "grouped 128": plain(20, 24, 4, 2, 128),
    "one key head of 64": plain(20, 24, 4, 1, 64),
    "one key head of 72": plain(20, 24, 3, 1, 72),
    "one key head of 128": plain(20, 24, 3, 1, 128, B=2),
    "causal": plain(300, 300, 2, 2, 64, intervals=causal(300)),
    "all keys": plain(20, 300, 2, 2, 64, intervals=window(20, 999, 999)),
    "past": plain(5, 300, 2, 2, 64, B=2, intervals=causal(5, 295)),
    "packed": plain(300, 300, 2, 2, 64, intervals=packed(100, 190, 10)),
    # The first two blocks see one tile, and all of it; the third sees some of the last.
    "packed evenly": plain(600, 600, 2, 2, 64, intervals=packed(256, 256, 88)),
    "two spans": plain(300, 257, 4, 2, 64, B=2, intervals=spans(300, 257)),
    "no keys": plain(20, 24, 2, 2, 64, intervals=jnp.zeros((1, 2, 20), jnp.int32)),
    "known causal": plain(300, 300, 2, 2, 64, B=2, **known(causal(300))),
    "known past": plain(5, 300, 2, 2, 128, **known(causal(5, 295))),
    "known packed": plain(300, 300, 2, 2, 64, **known(packed(100, 190, 10))),
    "known spans": plain(300, 257, 4, 2, 64, **known(spans(300, 257)[:1])),
    "known rows without keys": plain(300, 257, 2, 2, 64, **known(spans(300, 257)[1:])),
    "bias": plain(20, 33, 2, 2, 64, B=2, bias=draw(9, 2, 2, 20, 33)),
    "bias of batches": plain(
        20, 33, 2, 2, 64, B=2, bias=draw(8, 2, 1, 20, 33), intervals=spans(20, 33)
    ),
    "bias of heads": plain(
        20, 33, 2, 1, 64, B=2, bias=draw(8, 1, 2, 20, 33), intervals=spans(20, 33)[:1]
    ),
    "one bias": plain(
        20, 33, 2, 2, 128, B=2, bias=draw(8, 1, 1, 20, 33), **known(causal(20, 5))
    ),
    "bias of an uneven length": plain(1025, 24, 1, 1, 128, bias=draw(8, 1, 1, 1025, 24)),
    "slopes": plain(20, 33, 2, 2, 64, slopes=jnp.array([0.5, 0.1]), offset=-4),
    "cap": plain(20, 33, 2, 2, 64, softcap=2.0),
    "norm": plain(20, 33, 2, 2, 64, q=side(0, 20, 64, True), k=side(9, 33, 64, True, True)),
    "layer norm": plain(
        20, 33, 2, 2, 64, q=side(0, 20, 64, True, True, centered=True), k=side(9, 33, 64, True)
    ),
    "layer norm 72": plain(20, 33, 2, 1, 72, k=side(9, 33, 72, True, True, centered=True)),
    "rotary": plain(
        20,
        33,
        2,
        2,
        64,
        q=side(0, 20, 64, False, rotary=True),
        k=side(9, 33, 64, False, rotary=True),
    ),
    "rotary of batches": plain(
        20,
        33,
        2,
        2,
        128,
        B=2,
        k=dataclasses.replace(
            side(9, 33, 128, True),
            cos=jnp.cos(draw(3, 2, 33, 64)),
            sin=jnp.sin(draw(3, 2, 33, 64)),
        ),
    ),
    "all 64": (
        Sizes(2, 300, 270, 4, 2, 64),
        everything(300, 270, 64, 4, intervals=spans(300, 270), bias=draw(7, 1, 4, 300, 270)),
    ),
    "all 72": (
        Sizes(2, 20, 33, 4, 2, 72),
        everything(
            20, 33, 72, 4, centered=True, intervals=spans(20, 33), bias=draw(7, 2, 4, 20, 33)
        ),
    ),
    "all known": (
        Sizes(1, 20, 33, 2, 2, 64),
        everything(20, 33, 64, 2, bias=draw(7, 1, 1, 20, 33), **known(spans(20, 33)[:1])),
    ),
}


@functools.partial(jit, static_argnames="interpret")
def kernels(q, k, v, case, d_out, d_lse, interpret=True):
    out, lse = flash_tpu.forward(q, k, v, case, interpret=interpret)
    all_of = q, k, v, case, out, lse, d_out, d_lse
    return out, lse, flash_tpu_backward.backward(*all_of, interpret=interpret)


def named(found):
    """What there is to compare, by name."""
    out, lse, gradients = found
    every = {"out": out, "lse": lse} | vars(gradients)
    return {what: x for what, x in every.items() if x is not None}


def same(actual, expected, close=5e-6):
    """Within rounding to float32, measured by the largest entry."""
    actual, expected = named(actual), named(expected)
    assert actual.keys() == expected.keys()
    for what, y in expected.items():
        assert actual[what].dtype == y.dtype, what
        x, y = np.asarray(actual[what]), np.asarray(y)
        size = np.abs(y[np.isfinite(y)]).max(initial=1e-3)
        np.testing.assert_allclose(x, y, rtol=0, atol=close * size, err_msg=what)


@pytest.mark.parametrize("name", CASES)
def test_equals_dense(name):
    sizes, case = CASES[name]
    q, k, v, *d = sizes.arrays()
    same(kernels(q, k, v, case, *d), jit(differentiated)(q, k, v, case, *d))


BFLOAT16 = ["197", "grouped 128", "known causal", "layer norm 72", "all 64"]


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_errs_as_dense_does_that_rounds_what_products_take(name):
    sizes, case = CASES[name]
    q, k, v, *d = dataclasses.replace(sizes, dtype="bfloat16").arrays()
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    exact = named(jit(differentiated)(*wide, case, *d))
    formula = functools.partial(dense, rounded="bfloat16")
    usual = named(jit(functools.partial(differentiated, formula=formula))(q, k, v, case, *d))
    actual = named(kernels(q, k, v, case, *d))

    def error(x, what):
        """Root mean square, of what there is in rows with keys."""
        y = np.asarray(exact[what])
        some = np.isfinite(y)
        x = np.asarray(x.astype(q.dtype if what == "out" else x.dtype), np.float32)
        np.testing.assert_array_equal(np.isfinite(x), some)
        return np.sqrt(np.square(x[some] - y[some]).mean())

    for what, x in actual.items():
        assert x.dtype == (q.dtype if what in ("out", "q", "k", "v") else jnp.float32)
        assert error(x, what) <= 1.5 * error(usual[what], what) + 1e-6, what


def test_tiles_that_no_one_visits_have_no_gradient_of_bias():
    intervals = window(40, 9, 1)  # Of three tiles of keys the last two are not seen.
    sizes, case = plain(40, 600, 2, 2, 64, intervals=intervals, bias=draw(9, 1, 2, 40, 600))
    q, k, v, *d = sizes.arrays()
    found = kernels(q, k, v, case, *d)
    same(found, jit(differentiated)(q, k, v, case, *d))
    assert found[2].bias[..., :40].any() and not found[2].bias[..., 40:].any()


def test_rows_without_keys_are_zero_whatever_their_gradient():
    intervals = jnp.zeros((1, 2, 20), jnp.int32).at[:, 1, :10].set(20)
    q, k, v, d_out, d_lse = Sizes(1, 20, 20, 2, 2, 64).arrays()
    d_lse = d_lse.at[..., 10:].set(jnp.nan)
    out, lse, back = kernels(q, k, v, Case(intervals=intervals, scale=0.125), d_out, d_lse)
    assert not out[:, 10:].any() and (lse[..., 10:] == -jnp.inf).all()
    assert not back.q[:, 10:].any() and back.q[:, :10].all()
    assert jnp.isfinite(back.k).all() and jnp.isfinite(back.v).all()


PARTS = {
    "plain": (
        Sizes(1, 20, 1300, 2, 2, 64),
        dataclasses.replace(  # Slopes under which every part counts.
            everything(20, 1300, 64, 2, bias=draw(7, 1, 2, 20, 1300)),
            softcap=None,
            slopes=jnp.array([1e-3, 2e-3]),
        ),
    ),
    "two spans": plain(20, 1300, 2, 2, 64, B=2, intervals=spans(20, 1300)),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_the_whole(name, monkeypatch):
    sizes, case = PARTS[name]
    q, k, v, *d = sizes.arrays()
    monkeypatch.setattr(flash_tpu, "LEAST", 2**20)
    found = jax.jit(kernels.__wrapped__, compiler_options=FAST)(q, k, v, case, *d)
    for backward in (False, True):
        assert len(flash_tpu.cut(q, k, case, True, backward=backward)) == 3
    same(found, jit(differentiated)(q, k, v, case, *d))


ASTRIDE = {
    "plain 72": plain(20, 24, 16, 16, 72, B=2),
    "all 72": (Sizes(1, 20, 24, 16, 16, 72), everything(20, 24, 72, 16)),
    "grouped 96, two spans": plain(40, 50, 8, 4, 96, B=2, intervals=spans(40, 50)),
    "all 160": (
        Sizes(2, 24, 20, 8, 4, 160),
        everything(24, 20, 160, 8, centered=True, intervals=spans(24, 20)),
    ),
}


@pytest.mark.parametrize("name", ASTRIDE)
def test_heads_astride_of_lanes_are_heads(name, monkeypatch):
    """As they lie where a chip has no room for windows of their own."""
    sizes, case = ASTRIDE[name]
    q, k, v, *d = sizes.arrays()
    monkeypatch.setattr(flash_tpu, "LEAST", 2**18)
    for backward in (False, True):
        assert flash_tpu.make_step(q, k, case, backward=backward).lanes.astride
        assert len(flash_tpu.cut(q, k, case, True, backward=backward)) == 1
    found = jax.jit(kernels.__wrapped__, compiler_options=FAST)(q, k, v, case, *d)
    same(found, jit(differentiated)(q, k, v, case, *d))


LOOPS = {
    "all 72": (
        Sizes(2, 300, 290, 4, 2, 72),
        everything(300, 290, 72, 4, intervals=spans(300, 290), bias=draw(7, 1, 4, 300, 290)),
    ),
    "uneven blocks": (Sizes(1, 1025, 256, 2, 2, 64), everything(1025, 256, 64, 2)),
    "known spans": CASES["known spans"],
}


@pytest.mark.parametrize("name", LOOPS)
def test_rows_one_part_after_the_other_are_all_rows(name, monkeypatch):
    sizes, case = LOOPS[name]
    q, k, v, *d = sizes.arrays()
    whole = kernels(q, k, v, case, *d)

    def few(choose):
        return lambda *args, **names: dataclasses.replace(choose(*args, **names), written=128)

    for name in ("tpu", "tpu_known"):
        monkeypatch.setattr(tiles, name, few(getattr(tiles, name)))
    same(
        jax.jit(kernels.__wrapped__, compiler_options=FAST)(q, k, v, case, *d),
        whole,
        close=2e-5,
    )


def test_refuses_what_it_cannot_do():
    for dtype, H, reason in [
        ("float32", 20, "20"),
        ("float32", 264, "264"),
        ("float16", 64, "float16"),
    ]:
        q = jnp.zeros((1, 4, 1, H), dtype)
        with pytest.raises(NotImplementedError, match=reason):
            flash_tpu.forward(q, q, q, Case())
        with pytest.raises(NotImplementedError, match=reason):
            flash_tpu_backward.backward(q, q, q, Case(), q, q[..., 0], q)


# As on a TPU: memory starts as NaN, copies and their semaphores are simulated.
SIMULATED = {
    "several blocks": plain(1025, 40, 1, 1, 128),
    "two spans": plain(300, 270, 2, 2, 64, B=2, intervals=spans(300, 270)),
    "all": (
        Sizes(1, 300, 290, 2, 1, 72),
        everything(
            300, 290, 72, 2, centered=True, intervals=causal(300), bias=draw(7, 1, 2, 300, 290)
        ),
    ),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_without_races_and_whatever_memory_held(name, capfd):
    sizes, case = SIMULATED[name]
    q, k, v, *d = sizes.arrays()
    interpret = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", random_seed=0
    )
    try:
        found = jax.block_until_ready(kernels(q, k, v, case, *d, interpret=interpret))
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert "RACE" not in "".join(capfd.readouterr())
    same(found, jit(differentiated)(q, k, v, case, *d))
