"""What JAX can do to a function it can do to `attend`, whoever computes it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.kernels.case import Gradients
from jaxformer.ops import choose, dense
from jaxformer.ops.attention import attend, attend_lse
from jaxformer.ops.mask import Causal, Segments
from jaxformer.ops.norm import Norm

B, T, N, K, H = 2, 5, 2, 1, 8
MASK = Causal() & Segments(jnp.array([[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]))


def kernel_backward(q, k, v, case, out, lse, d_out, d_lse=None, *, interpret):
    """Of plain attention, from what the forward pass left: out and lse are the true ones."""
    assert interpret
    if not case.q.plain or case.bias is not None:
        return dense.backward(q, k, v, case, out, lse, d_out, d_lse)
    logits = jnp.einsum("btnh,bsh->bnts", q, k[:, :, 0]) * case.scale
    seen = dense.sets.seen(case.intervals, jnp.arange(k.shape[1]))[:, None]
    some = jnp.isfinite(lse)[..., None]
    p = jnp.where(seen & some, jnp.exp(logits - jnp.where(some, lse[..., None], 0)), 0)
    d = jnp.einsum("btnh,bsh->bnts", d_out, v[:, :, 0])
    delta = (out * d_out).sum(-1).swapaxes(1, 2)
    d = p * (d - (delta - (0 if d_lse is None else d_lse))[..., None]) * case.scale
    return Gradients(
        jnp.einsum("bnts,bsh->btnh", d, k[:, :, 0]),
        jnp.einsum("bnts,btnh->bsh", d, q)[:, :, None],
        jnp.einsum("bnts,btnh->bsh", p, d_out)[:, :, None],
    )


@pytest.fixture
def kernel(monkeypatch, unchecked):
    """A kernel by the name of "stub", which counts how often it is asked."""
    asked = {"forward": 0, "backward": 0}

    def forward(q, k, v, case, *, interpret):
        asked["forward"] += 1
        return dense.forward(q, k, v, case)

    def backward(*args, **options):
        asked["backward"] += 1
        return kernel_backward(*args, **options)

    monkeypatch.setitem(choose.KERNELS, "stub", choose.Kernel(forward, backward, "tpu"))
    monkeypatch.setattr(choose, "IMPLS", (*choose.IMPLS, "stub"))
    return asked


@pytest.fixture
def arrays(key):
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
    keys = jax.random.split(key, 3)
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


def loss(impl, q, k, v):
    out, lse = attend_lse(q, k, v, mask=MASK, impl=impl)
    return jnp.sin(out).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()


ALL = (0, 1, 2)
KEEP = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")


def along(f, arrays):
    return jax.jvp(f, arrays, jax.tree.map(jnp.cos, arrays))


def mapped(f):
    """Over queries and values, not over keys, which is where a batch must be made."""

    def run(q, k, v):
        two = jnp.stack([q, q + 1]), k, jnp.stack([v, 2 * v], 2)
        return jax.vmap(f, (0, None, 2))(*two)

    return run


def layers(f, **options):
    """Three in a row, each again in the backward pass."""

    def run(q, k, v):
        step = jax.checkpoint(lambda x, y: (x + f(q * x, k, v * y), None), **options)
        return jax.lax.scan(step, 1.0, jnp.arange(3.0))[0]

    return run


TRANSFORMATIONS = {
    "value": lambda f, x: f(*x),
    "grad": lambda f, x: jax.grad(f, ALL)(*x),
    "jvp": along,
    "jvp of grad": lambda f, x: along(jax.grad(f, ALL), x),
    "grad of jvp": lambda f, x: jax.grad(lambda *x: along(f, x)[1], ALL)(*x),
    "grad of grad": lambda f, x: jax.grad(
        lambda *x: sum(jnp.sin(g).sum() for g in jax.grad(f, ALL)(*x)), ALL
    )(*x),
    "vmap": lambda f, x: mapped(f)(*x),
    "vmap of grad": lambda f, x: mapped(jax.grad(f, ALL))(*x),
    "grad of vmap": lambda f, x: jax.grad(lambda *x: mapped(f)(*x).sum(), ALL)(*x),
    "jvp of vmap": lambda f, x: along(mapped(f), x),
    "remat in scan": lambda f, x: jax.grad(layers(f), ALL)(*x),
    "remat that keeps": lambda f, x: jax.grad(layers(f, policy=KEEP), ALL)(*x),
    "jvp of remat in scan": lambda f, x: along(layers(f, prevent_cse=False), x),
    "linearize": lambda f, x: jax.linearize(f, *x)[1](*jax.tree.map(jnp.cos, x)),
}


# Those that a kernel runs forward alone: XLA has the rest.
ONLY_FORWARD = {"value", "jvp", "vmap", "jvp of vmap", "jvp of remat in scan", "linearize"}


@functools.cache
def known(name):
    key = jax.random.key(0)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
    x = tuple(
        jax.random.normal(k, s) for k, s in zip(jax.random.split(key, 3), shapes, strict=True)
    )
    f = functools.partial(loss, "reference")
    return jax.jit(lambda *x: TRANSFORMATIONS[name](f, x))(*x)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("impl", ["auto", "stub"])
def test_equals_the_reference_under(name, impl, arrays, kernel):
    f = functools.partial(loss, impl)
    found = jax.jit(lambda *x: TRANSFORMATIONS[name](f, x))(*arrays)
    chex.assert_trees_all_close(found, known(name), rtol=1e-3, atol=2e-4)
    if impl == "stub":
        assert kernel["forward"] and bool(kernel["backward"]) == (name not in ONLY_FORWARD)


@pytest.mark.parametrize("name", ["jvp of grad", "grad of jvp", "remat in scan"])
def test_chunked_too(name, arrays):
    f = functools.partial(loss, "chunked")
    found = jax.jit(lambda *x: TRANSFORMATIONS[name](f, x))(*arrays)
    chex.assert_trees_all_close(found, known(name), rtol=1e-3, atol=2e-4)


def test_without_jit(arrays):
    f = functools.partial(loss, "auto")
    chex.assert_trees_all_close(f(*arrays), known("value"), rtol=1e-4)
    with jax.disable_jit():
        chex.assert_trees_all_close(f(*arrays), known("value"), rtol=1e-4)


@pytest.mark.parametrize("what", ["norm", "bias of one", "bias of each"])
def test_what_each_of_a_batch_learns(what, arrays, kernel):
    """vmap of grad where the batch shares a weight: one gradient for each."""
    q, k, v = arrays
    if what == "norm":
        shared = jnp.linspace(0.5, 2, H)
    else:
        shared = jnp.cos(jnp.arange(N * T * T).reshape(1, N, T, T))
        shared = jnp.broadcast_to(shared, (B, N, T, T)) if what == "bias of each" else shared

    def loss(impl, shared, q):
        given = {"norm": (Norm(shared), None)} if what == "norm" else {"bias": shared}
        return jnp.sin(attend(q, k, v, mask=MASK, impl=impl, **given)).sum()

    def run(impl):
        two = jnp.stack([q, 2 * q])
        back = jax.vmap(jax.grad(functools.partial(loss, impl)), (None, 0))(shared, two)
        many = jnp.stack([shared, -shared])
        ahead = lambda s: jax.jvp(functools.partial(loss, impl), (shared, q), (s, q))  # noqa: E731
        return back, jax.vmap(ahead)(many)

    found, expected = (
        jax.jit(functools.partial(run, impl))() for impl in ("stub", "reference")
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("impl", ["auto", "stub"])
def test_inside_a_shard_map_of_ones_own(impl, kernel, key):
    """Weights that all devices share get the gradient of all."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:4])  # fmt: skip
    q = jax.random.normal(key, (4, T, N, H))
    P = jax.P

    def loss(impl, scale, q):
        norm = (Norm(scale), Norm(scale))
        return jnp.sin(attend(q, q, q, norm=norm, impl=impl)).sum((1, 2, 3))

    cut = jax.shard_map(
        functools.partial(loss, impl), mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x")
    )
    grads = [
        jax.jit(jax.grad(lambda s, q, f=f: f(s, q).sum(), (0, 1)))(jnp.linspace(1, 2, H), q)
        for f in (cut, functools.partial(loss, "reference"))
    ]
    chex.assert_trees_all_close(*grads, rtol=1e-3, atol=1e-5)


def test_a_kernel_that_learns_nothing_of_constants(arrays):
    """Angles and slopes are constants, in the reference as in a kernel."""
    turn = jnp.ones((1, T, H // 2))
    for impl in ("reference", "auto"):
        f = lambda turn, impl=impl: attend(*arrays, angles=turn, impl=impl).sum()  # noqa: E731
        assert not np.any(jax.grad(f)(turn))
