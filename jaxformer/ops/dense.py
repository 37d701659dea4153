"""Attention in XLA with every logit at once: the specification of all others.

It has the face of `kernels.case`, and takes besides intervals any mask as it is. It is
plain jax.numpy, so that it is differentiated in any way by JAX itself.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.kernels.case import Case, Gradients, Side
from jaxformer.ops import intervals as sets
from jaxformer.ops.mask import Mask
from jaxformer.ops.norm import Norm
from jaxformer.ops.rotary import turn

Out = tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]


def forward(q, k, v, case: Case, mask: Mask | None = None) -> Out:
    """Attention by `case`; a `mask` stands in for intervals."""
    q, k = prepare(case.q, q), prepare(case.k, k)
    T = q.shape[1]
    return rows(q, jnp.arange(T), k, v, case, mask, T)


def backward(q, k, v, case, out, lse, d_out, d_lse=None, mask=None) -> Gradients:
    """What JAX makes of `forward`; `out` and `lse` are computed anew."""
    return differentiate(forward, q, k, v, case, d_out, d_lse, mask)


def differentiate(forward, q, k, v, case, d_out, d_lse, mask) -> Gradients:
    """The gradients of a `forward` that JAX can differentiate."""

    def run(learned):
        out, lse = forward(*join(learned, case), mask)
        return out if d_lse is None else (out, lse)

    learned, case = split(q, k, v, case)
    _, pull = jax.vjp(run, learned)
    return pull(d_out if d_lse is None else (d_out, d_lse))[0]


def split(q, k, v, case: Case) -> tuple[Gradients, Case]:
    """What may be learned, and the rest of the case."""
    learned = Gradients(
        q, k, v, case.bias, case.q.scale, case.q.shift, case.k.scale, case.k.shift
    )
    sides = {n: _side(getattr(case, n), None, None) for n in "qk"}
    return learned, dataclasses.replace(case, bias=None, **sides)


def join(learned: Gradients, case: Case) -> tuple[Array, Array, Array, Case]:
    """The inverse of `split`."""
    x = learned
    q, k = _side(case.q, x.q_scale, x.q_shift), _side(case.k, x.k_scale, x.k_shift)
    return x.q, x.k, x.v, dataclasses.replace(case, q=q, k=k, bias=x.bias)


def prepare(side: Side, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Normalises, then rotates, each in float32 and rounded to the dtype of `x`."""
    if side.scale is not None:
        x = Norm(side.scale, side.shift, side.epsilon, side.centered)(x)
    return x if side.cos is None or side.sin is None else turn(x, side.cos, side.sin)


def products(q, k, case: Case) -> Float[Array, "B K G T S"]:
    """Scaled and capped products in float32 of `B T N H` and `B S K H`.

    Heads lead and the `G` queries of a key head lie below one another, so that it is one
    batched product of plain matrices, which a CPU does twice as fast as the einsum.
    """
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    single = q.dtype == jnp.float32  # Where it is less, the scale would round q again.
    q = (q * case.scale if single else q).swapaxes(1, 2).reshape(B, K, N // K * T, H)
    logits = _product(q, k.transpose(0, 2, 3, 1))
    logits = logits.reshape(B, K, N // K, T, S)
    logits = logits if single else logits * case.scale
    cap = case.softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def rows(q, index, k, v, case: Case, mask: Mask | None, T: int) -> Out:
    """Attention of the queries `q`, which stand at `index` among all `T`.

    Bias and intervals of the case are of these queries alone; the sides are done with.
    """
    (B, t, N, H), (_, S, K, _) = q.shape, k.shape
    logits = products(q, k, case)
    if case.bias is not None:
        bias = case.bias.astype(jnp.float32)
        bias = jnp.broadcast_to(bias, (bias.shape[0], N, *bias.shape[2:]))
        logits += bias.reshape(-1, K, N // K, t, S)
    if case.slopes is not None:
        distance = jnp.abs(index[:, None] + case.offset - jnp.arange(S)[None])
        slopes = case.slopes.reshape(1, K, N // K, 1, 1)
        logits -= slopes * distance.astype(jnp.float32)[None, None, None]
    seen = None
    if mask is not None:
        seen = mask.visible(index, jnp.arange(S), (T, S))
    elif case.intervals is not None:
        seen = sets.seen(case.intervals, jnp.arange(S))
    if seen is not None:
        seen = seen[:, None, None]
        logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
    highest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    highest = jnp.maximum(highest, jnp.finfo(logits.dtype).min)  # Where a bias is -inf.
    weights = jnp.exp(logits - highest)
    if seen is not None:
        weights = jnp.where(seen, weights, 0)
    total = weights.sum(-1, keepdims=True)
    some = total > 0  # A row that sees nothing is 0.
    total = jnp.where(some, total, 1)
    lse = jnp.where(some, highest + jnp.log(total), -jnp.inf).reshape(B, N, t)
    # Divided after the product, where there are H numbers a row and not S.
    weights = weights.astype(v.dtype).reshape(B, K, N // K * t, S)
    y = _product(weights, v.swapaxes(1, 2))
    y = y.reshape(B, K, N // K, t, H) / total
    return y.reshape(B, N, t, H).swapaxes(1, 2).astype(q.dtype), lse


def _product(a: Array, b: Array) -> Array:
    """Of matrices, summed in float32, and float32 ones not cut to less, as in the kernels."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def _side(side: Side, scale, shift) -> Side:
    return dataclasses.replace(side, scale=scale, shift=shift)
