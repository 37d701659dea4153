"""Every implementation of `attend` runs one table against softmax attention in float64."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.attention import attend, chunked, max_logit
from jaxformer.ops.mask import Causal, Full, Prefix, Segments, Window

# A small budget makes several chunks of the short rows of this table.
IMPLEMENTATIONS = {
    "reference": functools.partial(attend, impl="reference"),
    "chunked": lambda q, k, v, *, mask=None, scale=None, softcap=None, bias=None: chunked(
        q, k, v, mask=mask or Full(), scale=scale or q.shape[-1] ** -0.5, softcap=softcap,
        bias=bias, logits=3 * k.shape[1],
    ),
}  # fmt: skip

IDS = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 0]])
CASES = {
    "plain": {},
    "one query": {"T": 1, "S": 7},
    "cross": {"T": 7, "S": 3},
    "grouped": {"N": 4, "K": 2},
    "multi-query": {"N": 4, "K": 1},
    "causal": {"mask": Causal()},
    "causal with a past": {"T": 3, "S": 7, "mask": Causal(4)},
    "window": {"mask": Window(1, 2)},
    "prefix": {"mask": Causal() | Prefix(jnp.array([2, 5]))},
    "packed, empty rows": {"mask": Segments(IDS)},
    "scale, cap": {"scale": 0.3, "softcap": 2.0},
    "bias": {"bias": (2, 4, 7, 7), "N": 4, "K": 2},
    "bias of all heads": {"bias": (1, 1, 7, 7), "mask": Causal()},
}


def exact(q, k, v, *, mask=None, scale=None, softcap=None, bias=None):
    """Softmax attention in NumPy's float64, one head and row at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    seen = np.ones((1, T, S), bool) if mask is None else np.asarray(mask.dense(T, S))
    seen = np.broadcast_to(seen, (B, T, S))
    out = np.zeros(q.shape)
    for b, n, t in itertools.product(range(B), range(N), range(T)):
        keys = np.flatnonzero(seen[b, t])
        if not keys.size:
            continue
        logits = k[b, keys, n // (N // K)] @ q[b, t, n] * (scale or H**-0.5)
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        if bias is not None:
            logits += np.broadcast_to(np.asarray(bias, np.float64), (B, N, T, S))[b, n, t, keys]
        weights = np.exp(logits - logits.max())
        out[b, t, n] = weights @ v[b, keys, n // (N // K)] / weights.sum()
    return out


def inputs(key, T=7, S=7, N=2, K=2, bias=None, dtype=jnp.float32, **options):
    keys = jax.random.split(key, 4)
    q = jax.random.normal(keys[0], (2, T, N, 8), dtype)
    k = jax.random.normal(keys[1], (2, S, K, 8), dtype)
    v = jax.random.normal(keys[2], (2, S, K, 8), dtype)
    if bias is not None:
        options["bias"] = jax.random.normal(keys[3], bias)
    return (q, k, v), options


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_values_equal_float64(impl, name, key):
    arrays, options = inputs(key, **CASES[name])
    out = jax.jit(lambda *a: IMPLEMENTATIONS[impl](*a, **options))(*arrays)
    np.testing.assert_allclose(out, exact(*arrays, **options), atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_chunked_gradients_and_tangents_equal_the_reference(name, key):
    arrays, options = inputs(key, **CASES[name])
    tangents = jax.tree.map(jnp.cos, arrays)

    def both(attend):
        def loss(*arrays):
            return jnp.sin(attend(*arrays, **options)).sum()

        def run(*arrays):
            grads = jax.grad(loss, argnums=(0, 1, 2))(*arrays)
            return grads, jax.jvp(loss, arrays, tangents)

        return jax.jit(run)(*arrays)

    a, b = (both(attend) for attend in IMPLEMENTATIONS.values())
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_row_that_sees_nothing_is_zero_with_gradient_zero(impl, key):
    arrays, _ = inputs(key)
    mask = Segments(jnp.zeros((2, 7), int))
    out, grads = jax.value_and_grad(
        lambda q: jnp.cos(IMPLEMENTATIONS[impl](q, *arrays[1:], mask=mask)).sum()
    )(arrays[0])
    assert out == arrays[0].size and not grads.any()


def test_chunked_memory_does_not_grow_with_the_square():
    def bytes_at(length, impl):
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        loss = lambda q, k, v: attend(q, k, v, impl=impl).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = bytes_at(2048, "chunked"), bytes_at(8192, "chunked")
    assert long < 4.5 * short, "four times the length, at most four times the memory"
    assert bytes_at(8192, "reference") > 8192 * 8192 * 4
    assert long < 8192 * 8192 * 4 / 16


def test_bfloat16_errs_as_little_as_its_rounding(key):
    arrays, _ = inputs(key, dtype=jnp.bfloat16)
    out = attend(*arrays)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), exact(*arrays), atol=2e-2)


def test_max_logit(key):
    (q, k, _), _ = inputs(key, N=4, K=2)
    logits = np.einsum("btngh,bsnh->bngts", q.reshape(2, 7, 2, 2, 8), k) / 8**0.5
    found = max_logit(q, k, mask=Causal())
    seen = np.tril(np.ones((7, 7), bool))
    expected = np.where(seen, logits, -np.inf).max((0, 3, 4)).reshape(4)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


BAD = {
    "rank": ({"q": (2, 7, 8)}, r"q has shape \(2, 7, 8\) and must be \[B, T, heads, H\]"),
    "heads": ({"q": (2, 7, 3, 8)}, "q has 3 heads, which must be a multiple of the 2 of k"),
    "head size": ({"q": (2, 7, 2, 4)}, "must agree in batch and head size"),
    "values": ({"v": (2, 6, 2, 8)}, "must have one shape"),
    "bias": ({"bias": (2, 2, 7, 6)}, r"must broadcast to \(2, 2, 7, 7\)"),
    "impl": ({"impl": "flash"}, "impl='flash' must be one of"),
    "mask": ({"mask": Segments(IDS[:, :5])}, "must have 7 columns"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument_and_the_rule(name, unchecked):
    changes, message = BAD[name]
    shapes = {n: changes.get(n, (2, 7, 2, 8)) for n in "qkv"}
    arrays = [jnp.zeros(s) for s in shapes.values()]
    options = {n: v for n, v in changes.items() if n not in "qkv"}
    if "bias" in options:
        options["bias"] = jnp.zeros(options["bias"])
    with pytest.raises(ValueError, match=message):
        attend(*arrays, **options)
