"""Every implementation of `attend` runs one table against softmax attention in float64.

To add an implementation is to add a row to `IMPLEMENTATIONS`, a case a line to `CASES`.
The tolerance is no number of ours: twice the error that plain attention, written in
jax.numpy below and differentiated by JAX, makes in the same dtype.
"""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import choose, chunked
from jaxformer.ops.alibi import Alibi, alibi_slopes
from jaxformer.ops.attention import attend_lse
from jaxformer.ops.mask import (
    BlockDiffusion,
    Causal,
    Full,
    Mask,
    Prefix,
    Segments,
    Spans,
    Twice,
    Window,
)  # fmt: skip
from jaxformer.ops.norm import Norm
from tests.ops.exact import EPSILON, Exact


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table; `bias` is its batch and heads, `norm` its kind."""

    T: int = 7
    S: int = 7
    H: int = 64
    N: int = 2
    K: int = 2
    B: int = 2
    mask: Any = Full
    bias: tuple[int, int] | None = None
    alibi: bool = False
    offset: int = 0
    scale: float | None = None
    softcap: float | None = None
    norm: str | None = None
    angles: bool = False
    dtype: Any = jnp.float32


def ids(B, T):
    """Segments of uneven lengths, with padding at the end, and all over the second row."""
    cuts = [0, T // 5, T // 5 + max(1, T // 3), T - T // 6, T]
    row = np.repeat([3, 1, 2, 0], np.diff(cuts))
    return jnp.asarray(np.stack([row] + [np.zeros_like(row)] * (B - 1)))


def spans(T):
    return Spans(jnp.array([[1, T // 2], [0, T]]), jnp.array([[T // 4 + 1, T - 1], [3, T]]))


def far(keys):
    return lambda T, S: Segments(ids(2, T), ids(2, S)[:, ::-1] if keys else ids(2, S))


half = jnp.bfloat16
CASES = {
    "plain": Case(),
    "one by one": Case(1, 1, 80),
    "one query": Case(1, 257),
    "one key": Case(64, 1, 72),
    "cross": Case(7, 64, 72, 4, 2),
    "multi-query": Case(64, 7, 96, 4, 1),
    "197": Case(197, 197, 64, B=1),
    "197 in half": Case(197, 197, 72, B=1, dtype=half),
    "wide head": Case(64, 64, 256, B=1),
    "causal": Case(64, 64, 80, mask=lambda T, S: Causal()),
    "causal in half": Case(257, 257, 128, 4, 2, B=1, mask=lambda T, S: Causal(), dtype=half),
    "causal with a past": Case(7, 64, mask=lambda T, S: Causal(57)),
    "causal, first rows empty": Case(mask=lambda T, S: Causal(-3)),
    "window": Case(64, 64, mask=lambda T, S: Window(9, 2)),
    "sliding": Case(257, 257, 64, 1, 1, 1, mask=lambda T, S: Causal() & Window(70)),
    "prefix": Case(64, 64, mask=lambda T, S: Causal() | Prefix(jnp.array([20, 0]))),
    "prefix alone": Case(mask=lambda T, S: Prefix(jnp.array([0, 5]))),
    "packed": Case(197, 197, 64, mask=lambda T, S: Segments(ids(2, T))),
    "packed, causal": Case(64, 64, mask=lambda T, S: Segments(ids(2, T)) & Causal()),
    "packed, cross": Case(64, 7, mask=far(True)),
    "spans": Case(64, 64, mask=lambda T, S: Causal() | spans(T)),
    "spans alone": Case(64, 64, 72, mask=lambda T, S: spans(T)),
    "spans, packed": Case(mask=lambda T, S: (Causal() | spans(T)) & Segments(ids(2, T))),
    "block diffusion": Case(64, 64, 128, mask=lambda T, S: BlockDiffusion(5)),
    "block diffusion, packed": Case(
        64, 64, mask=lambda T, S: BlockDiffusion(5) & Twice(Segments(ids(2, T // 2)))
    ),
    "scale and cap": Case(64, 64, scale=0.3, softcap=2.0),
    "a high cap": Case(softcap=1e4),
    "bias": Case(64, 7, 64, 4, 2, bias=(2, 4)),
    "bias of all": Case(bias=(1, 1), mask=lambda T, S: Causal()),
    "alibi": Case(64, 64, 64, 6, 2, alibi=True),
    "alibi with a past": Case(7, 64, alibi=True, offset=57, mask=lambda T, S: Causal(57)),
    "rms": Case(64, 64, norm="rms"),
    "layer norm and angles": Case(64, 64, 72, 4, 2, norm="layer", angles=True),
    "angles": Case(64, 64, 96, angles=True),
    "all": Case(
        64, 64, 80, 4, 2, bias=(1, 4), softcap=3.0, norm="rms", angles=True,
        mask=lambda T, S: Causal() | Prefix(jnp.array([9, 3])),
    ),
    "all in half": Case(
        64, 64, 64, 4, 2, norm="rms", angles=True, mask=lambda T, S: Segments(ids(2, T)),
        dtype=half,
    ),
    "1025": Case(1025, 1025, 64, 1, 1, 1, mask=lambda T, S: Causal()),
    "1025 cross in half": Case(1025, 257, 64, 2, 1, 1, norm="rms", angles=False, dtype=half),
}  # fmt: skip
SLOW = {"1025", "1025 cross in half"}

# Who runs which cases. "auto" is XLA on a CPU by way of the primitives; kernels are
# interpreted, which is slow, and their own tests have more of them.
EVERY = tuple(CASES)
MORE = (
    "cross", "causal in half", "spans, packed", "spans", "scale and cap", "bias",
    "alibi with a past", "all", "197 in half", "1025",
)  # fmt: skip
SOME = ("cross", "causal in half", "spans", "all")
KERNEL = (*SOME, "causal, first rows empty", "alibi", "a high cap")
IMPLEMENTATIONS = {
    "reference": EVERY, "chunked": MORE, "auto": SOME, "tpu": KERNEL, "gpu": KERNEL,
}  # fmt: skip
# And who runs which besides, where slow tests run.
BESIDES = dict.fromkeys(IMPLEMENTATIONS, EVERY)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case with its numbers: arrays, where they move, and what the loss weighs."""

    arrays: dict
    moves: dict
    d_out: Any
    d_lse: Any
    mask: Mask
    angles: Any
    slopes: Any


@functools.cache
def problem(name) -> Problem:
    c = CASES[name]
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    shapes = {"q": (c.B, c.T, c.N, c.H)} | dict.fromkeys("kv", (c.B, c.S, c.K, c.H))
    if c.bias:
        shapes["bias"] = (*c.bias, c.T, c.S)
    for side in "qk" if c.norm else "":
        shapes[f"{side}_scale"] = (c.H,)
        if c.norm == "layer":
            shapes[f"{side}_shift"] = (c.H,)

    def make(name, shape):
        x = draw.normal(size=shape) + (name.endswith("scale"))
        return jnp.asarray(x, c.dtype if name in "qkv" else jnp.float32)

    arrays, moves = ({n: make(n, s) for n, s in shapes.items()} for _ in range(2))
    mask = Full() if c.mask is Full else c.mask(c.T, c.S)
    seen = np.broadcast_to(mask.dense(c.T, c.S), (c.B, c.T, c.S))
    some = np.broadcast_to(seen.any(-1)[:, None], (c.B, c.N, c.T))
    d_lse = jnp.where(some, jnp.asarray(draw.normal(size=some.shape), jnp.float32), 0)
    turn = jnp.asarray(draw.uniform(-3, 3, (1, c.T, c.H // 2)), jnp.float32)
    slopes = alibi_slopes(c.N) if c.alibi else None
    d_out = make("q", shapes["q"])
    return Problem(arrays, moves, d_out, d_lse, mask, turn if c.angles else None, slopes)


def everything(attend, name, forward=True):
    """Output, logsumexp, gradients and tangent of an implementation, in one program.

    Without `forward`, no tangent: XLA computes that of all kernels, as it does of "auto".
    """
    p = problem(name)

    def run(arrays, moves, mask, d_out, d_lse):
        (out, lse), pull = jax.vjp(functools.partial(attend, mask=mask), arrays)
        grads = pull((d_out, d_lse))[0]
        found = {"out": out, "lse": lse, **grads}
        if forward:
            both = jax.jvp(functools.partial(attend, mask=mask), (arrays,), (moves,))[1]
            found["tangent"] = both[0]
        return found

    found = jax.jit(run)(p.arrays, p.moves, p.mask, p.d_out, p.d_lse)
    return {n: np.asarray(x, np.float64) for n, x in found.items()}


def ours(arrays, *, mask, name, impl):
    c, p = CASES[name], problem(name)
    norm = None
    if c.norm:
        weights = ((arrays[f"{n}_scale"], arrays.get(f"{n}_shift")) for n in "qk")
        norm = tuple(Norm(*w, EPSILON, centered=c.norm == "layer") for w in weights)
    bias = Alibi(jnp.asarray(p.slopes), c.offset) if c.alibi else arrays.get("bias")
    options = {"scale": c.scale, "softcap": c.softcap, "bias": bias, "norm": norm}
    q, k, v = (arrays[n] for n in "qkv")
    return attend_lse(q, k, v, mask=mask, angles=p.angles, impl=impl, **options)


def plain(arrays, *, mask, name):
    """Attention as one writes it down, in the dtype of q with a softmax in float32."""
    c, p = CASES[name], problem(name)
    f32 = jnp.float32

    def side(n):
        x, dtype = arrays[n].astype(f32), arrays[n].dtype
        if c.norm:
            x = x - x.mean(-1, keepdims=True) if c.norm == "layer" else x
            x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + EPSILON)
            x = x * arrays[f"{n}_scale"][None, None, None]
            if f"{n}_shift" in arrays:
                x = x + arrays[f"{n}_shift"][None, None, None]
            x = x.astype(dtype).astype(f32)
        if c.angles:
            cos, sin = (f(p.angles)[:, :, None] for f in (jnp.cos, jnp.sin))
            a, b = jnp.split(x, 2, -1)
            x = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        return x.astype(dtype)

    q, k = side("q"), side("k")
    k, v = (jnp.repeat(x, c.N // c.K, axis=2) for x in (k, arrays["v"]))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=f32)
    logits *= c.H**-0.5 if c.scale is None else c.scale
    if c.softcap:
        logits = c.softcap * jnp.tanh(logits / c.softcap)
    if "bias" in arrays:
        logits += jnp.broadcast_to(arrays["bias"], (arrays["bias"].shape[0], *logits.shape[1:]))
    if c.alibi:
        away = jnp.abs(jnp.arange(c.T)[:, None] + c.offset - jnp.arange(c.S)[None])
        logits -= jnp.asarray(p.slopes)[None, :, None, None] * away[None, None]
    seen = mask.dense(c.T, c.S)[:, None]
    logits = jnp.where(seen, logits, -1e30)
    weights = jnp.where(seen, jax.nn.softmax(logits, -1), 0).astype(v.dtype)
    lse = jnp.where(seen.any(-1), jax.nn.logsumexp(logits, -1), -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", weights, v), lse


@functools.cache
def expected(name):
    """What is exact, and how far plain attention is from it."""
    c, p = CASES[name], problem(name)
    x = {n: np.asarray(a, np.float64) for n, a in p.arrays.items()}
    seen = np.broadcast_to(p.mask.dense(c.T, c.S), (c.B, c.T, c.S))
    angles = None if p.angles is None else np.asarray(p.angles, np.float64)
    scale = c.H**-0.5 if c.scale is None else c.scale
    exact = Exact(x, seen, scale, c.softcap, p.slopes, c.offset, c.norm == "layer", angles)
    out, lse = exact.forward()
    found = {"out": out, "lse": lse}
    found |= exact.backward(*(np.asarray(d, np.float64) for d in (p.d_out, p.d_lse)))
    found["tangent"] = exact.tangent({n: np.asarray(m, np.float64) for n, m in p.moves.items()})
    errors = {n: far_from(a, found[n]) for n, a in everything(
        functools.partial(plain, name=name), name
    ).items()}  # fmt: skip
    return found, errors


def far_from(found, exact) -> float:
    """The greatest error; where one is infinite, the other has to be."""
    assert (np.isinf(found) == np.isinf(exact)).all() and not np.isnan(found).any()
    finite = np.isfinite(exact)
    return np.abs(found[finite] - exact[finite]).max(initial=0)


def table():
    """Case by case, so that one worker has the implementations that share what is exact."""
    for name in CASES:
        for impl, names in IMPLEMENTATIONS.items():
            if name in names or name in BESIDES.get(impl, ()):
                slow = name in SLOW or name not in names
                slow |= name == "all" and impl in choose.KERNELS
                marks = [pytest.mark.slow] if slow else []
                yield pytest.param(impl, name, id=f"{name}-{impl}", marks=marks)


@pytest.mark.parametrize(("impl", "name"), list(table()))
def test_values_gradients_and_tangents_equal_float64(impl, name, monkeypatch):
    # A small budget, so that these short rows are several chunks too.
    monkeypatch.setattr(chunked, "LOGITS", 23 * CASES[name].S)
    exact, errors = expected(name)
    forward = impl not in choose.KERNELS
    found = everything(functools.partial(ours, name=name, impl=impl), name, forward)
    assert set(found) == set(exact) - (set() if forward else {"tangent"})
    eps = float(jnp.finfo(jnp.float32).eps)
    for part, x in found.items():
        finite = np.abs(exact[part][np.isfinite(exact[part])]).max(initial=1e-6)
        # Plain attention may be lucky: sums round otherwise on another kind of processor.
        allowed = 2 * errors[part] + 16 * eps * finite
        if part == "lse" and not forward:  # A kernel may sum the weights as it rounds them.
            allowed = max(allowed, float(jnp.finfo(CASES[name].dtype).eps) / 2)
        assert far_from(x, exact[part]) <= allowed, part
