"""The Triton kernels against dense softmax attention, and through Triton's lowering.

What a tile has outside of its array is NaN where the kernels are interpreted, so that any
such value that reached a result would show.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.kernels import flash_gpu, flash_gpu_backward
from jaxformer.kernels.case import Case
from jaxformer.kernels.flash_gpu_tile import split, width
from jaxformer.kernels.tiles import Gpu
from tests.kernels.dense import Sizes, differentiated, draw, side, spans, window

# Little is computed here, so that compiling is what takes time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)


CASES = {
    "one": (Sizes(1, 1, 1, 1, 1, 1), Case()),
    "one query": (Sizes(2, 1, 40, 2, 1, 16), Case(scale=0.3)),
    "cross, grouped": (Sizes(2, 37, 50, 4, 2, 72), Case(scale=0.1)),
    "even": (Sizes(1, 32, 32, 1, 1, 40), Case(scale=0.2, softcap=0.5)),
    "window": (
        Sizes(2, 45, 45, 2, 2, 24),
        Case(intervals=window(45, 19, 1), slopes=jnp.array([0.1, 0.3]), offset=3, scale=0.3),
    ),
    "two spans": (
        Sizes(2, 50, 70, 2, 1, 16),
        Case(intervals=spans(50, 70), bias=draw(9, 1, 2, 50, 70), scale=0.3),
    ),
    "bias of batches": (
        Sizes(2, 20, 33, 2, 2, 8),
        Case(bias=draw(8, 2, 1, 20, 33).at[:, :, :, 3].set(-jnp.inf), scale=0.3, softcap=2.0),
    ),
    "norm": (
        Sizes(1, 20, 35, 2, 1, 80),
        Case(side(0, 20, 80, True), side(9, 35, 80, True, True, centered=True), scale=0.1),
    ),
    "rotary of keys": (
        Sizes(2, 20, 35, 1, 1, 36),
        Case(k=side(9, 35, 36, False, rotary=True), scale=0.2),
    ),
    "all": (
        Sizes(2, 35, 50, 4, 2, 20),
        Case(
            side(0, 35, 20, True, True, True, True),
            side(5, 50, 20, True, False, True),
            spans(35, 50)[1:],
            draw(7, 2, 4, 35, 50),
            jnp.array([0.1, 0.2, 0.3, 0.4]),
            -4,
            0.3,
            3.0,
        ),
    ),
    # With the tiles that a GPU would have.
    "197": (Sizes(1, 197, 197, 2, 1, 64, "bfloat16"), Case(scale=0.125)),
    "1025": (
        Sizes(1, 130, 1025, 1, 1, 16, "float16"),
        Case(intervals=window(130, 20, 900), scale=0.25),
    ),
    "256": (Sizes(1, 70, 33, 1, 1, 256), Case(scale=1 / 16)),
}


def same(actual, expected, dtype: str, what: str):
    """Within the rounding of `dtype`, measured by the largest entry."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    finite = np.isfinite(expected)
    size = np.abs(expected[finite]).max(initial=1e-3)
    close = {"float32": 3e-6, "bfloat16": 2e-2, "float16": 3e-3}[dtype] * size
    np.testing.assert_allclose(actual, expected, rtol=0, atol=close, err_msg=what)


@pytest.fixture
def small(monkeypatch):
    """Tiles of 16 by 16: a few tokens are many tiles."""
    for module in (flash_gpu, flash_gpu_backward):
        monkeypatch.setattr(module, "gpu", lambda *args, **names: Gpu(16, 16, 1, 1))


@pytest.mark.parametrize("name", CASES)
def test_equals_dense(name, request):
    sizes, case = CASES[name]
    if sizes.dtype == "float32" and name != "256":
        request.getfixturevalue("small")
    q, k, v, d_out, d_lse = sizes.arrays()

    @jit
    def kernel(q, k, v, case, d_out, d_lse):
        out, lse = flash_gpu.forward(q, k, v, case, interpret=True)
        back = flash_gpu.backward(q, k, v, case, out, lse, d_out, d_lse, interpret=True)
        return out, lse, back

    out, lse, back = kernel(q, k, v, case, d_out, d_lse)
    whole, sums, expected = jit(differentiated)(q, k, v, case, d_out, d_lse)
    assert out.dtype == q.dtype
    same(out, whole, sizes.dtype, "out")
    same(lse, sums, sizes.dtype, "lse")
    for what, value in vars(expected).items():
        if value is None:
            assert getattr(back, what) is None, what
        else:
            assert getattr(back, what).dtype == value.dtype, what
            same(getattr(back, what), value, sizes.dtype, what)


def test_rows_without_keys_are_zero_whatever_their_gradient(small):
    intervals = jnp.zeros((1, 2, 20), jnp.int32).at[:, 1, :10].set(20)
    q, k, v, d_out, _ = Sizes(1, 20, 20, 1, 1, 16).arrays()
    case = Case(intervals=intervals, scale=0.25)
    out, lse = jit(functools.partial(flash_gpu.forward, interpret=True))(q, k, v, case)
    assert not out[:, 10:].any() and (lse[..., 10:] == -jnp.inf).all()
    d_lse = jnp.where(lse == -jnp.inf, jnp.nan, 1.0)
    f = jit(functools.partial(flash_gpu.backward, interpret=True))
    back = f(q, k, v, case, out, lse, d_out, d_lse)
    assert not back.q[:, 10:].any() and back.q[:, :10].all()
    assert jnp.isfinite(back.k).all() and jnp.isfinite(back.v).all()


@pytest.mark.parametrize("size", [1, 16, 17, 36, 64, 72, 80, 96, 104, 128, 200, 256])
def test_parts_cover_a_head_once(size):
    parts = split(0, size)
    assert [c for first, n in parts for c in range(first, first + n)] == list(range(size))
    assert size <= sum(width(n) for _, n in parts) <= max(32, size * 1.34)


def test_refuses_what_it_cannot_do():
    for dtype, H, reason in [("int8", 16, "int8"), ("bfloat16", 257, "257")]:
        q = jnp.zeros((1, 4, 1, H), dtype)
        with pytest.raises(NotImplementedError, match=reason):
            flash_gpu.forward(q, q, q, Case())
    with pytest.raises(NotImplementedError, match="one dtype"):
        flash_gpu.forward(q[..., :16], q[..., :16].astype("float32"), q[..., :16], Case())


TRITON = "__gpu$xla.gpu.triton"
LOWERED = {
    "64": (Sizes(1, 300, 300, 2, 1, 64, "bfloat16"), Case(intervals=window(300, 300, 1))),
    "72": (Sizes(1, 256, 256, 2, 2, 72, "bfloat16"), Case()),
    "128": (Sizes(1, 257, 300, 2, 2, 128, "bfloat16"), Case(softcap=3.0)),
    "256": (Sizes(1, 256, 256, 1, 1, 256, "bfloat16"), Case()),
    "float32": (Sizes(1, 256, 256, 1, 1, 96), Case()),
    "all": (dataclasses.replace(CASES["all"][0], dtype="bfloat16"), CASES["all"][1]),
}


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # jax 0.12.
@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    sizes, case = LOWERED[name]

    def f(q, k, v, d_out, d_lse):
        out, lse = flash_gpu.forward(q, k, v, case)
        return flash_gpu.backward(q, k, v, case, out, lse, d_out, d_lse)

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sizes.arrays()]
    check = jax.export.DisabledSafetyCheck.custom_call(TRITON)
    export = jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=[check])
    device = jax.sharding.AbstractDevice("NVIDIA H200", None, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert export(*shapes).mlir_module().count(TRITON) == 3
