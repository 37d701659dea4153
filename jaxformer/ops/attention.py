"""`attend`: softmax attention, its specification and the choice of who computes it."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.ops.mask import Full, Mask

Impl = Literal["auto", "reference", "chunked"]

# Above so many logits a head, "auto" leaves the path that holds them all at once.
DENSE_LOGITS = 1024 * 1024


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    impl: Impl = "auto",
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped keys: `softmax(q k / sqrt(H) + bias) v`.

    The softmax runs in float32, products in the dtype of `q`. A query that the mask
    leaves without keys gives 0, with gradient 0.

    Args:
      q: queries. `N` is a multiple of `K`; queries `n` share key head `n // (N // K)`.
      k: keys.
      v: values.
      mask: which keys a query sees, see `jaxformer.ops.mask`; None is all of them.
      scale: factor of the products, `H ** -0.5` if not given.
      softcap: bounds logits smoothly to +- softcap: `softcap * tanh(logits / softcap)`.
      bias: added to the logits after scale and cap.
      impl: "reference" holds all `T * S` logits; "chunked" holds a few rows of them at
        a time, forward and backward; "auto" chooses by `T * S`.

    Raises:
      ValueError: shapes that do not agree, or an unknown `impl`.
    """
    mask = Full() if mask is None else mask
    _check(q, k, v, mask, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    T, S = q.shape[1], k.shape[1]
    if impl == "auto":
        impl = "reference" if T * S <= DENSE_LOGITS else "chunked"
    attend = {"reference": reference, "chunked": chunked}.get(impl)
    if attend is None:
        raise ValueError(f"impl={impl!r} must be one of auto, reference, chunked")
    return attend(q, k, v, mask=mask, scale=scale, softcap=softcap, bias=bias)


def reference(q, k, v, *, mask, scale, softcap, bias):
    """The specification: every logit at once."""
    T = q.shape[1]
    return _rows(q, jnp.arange(T), k, v, bias, mask, T, scale, softcap)


def chunked(q, k, v, *, mask, scale, softcap, bias, logits=DENSE_LOGITS // 4):
    """The same, some rows at a time: at most about `logits` logits a head are alive."""
    B, T, N, H = q.shape
    rows = min(T, max(1, logits // k.shape[1]))
    chunks = math.ceil(T / rows)
    spare = chunks * rows - T
    q = jnp.pad(q, ((0, 0), (0, spare), (0, 0), (0, 0)))
    q = q.reshape(B, chunks, rows, N, H).swapaxes(0, 1)
    index = jnp.arange(chunks * rows).reshape(chunks, rows)
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, spare), (0, 0)))
        bias = jnp.moveaxis(bias.reshape(*bias.shape[:2], chunks, rows, -1), 2, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(_, inputs):
        q, index, bias = inputs
        return _, _rows(q, index, k, v, bias, mask, T, scale, softcap)

    _, out = jax.lax.scan(chunk, None, (q, index, bias))
    return out.swapaxes(0, 1).reshape(B, chunks * rows, N, H)[:, :T]


def max_logit(q, k, *, mask: Mask | None = None, scale=None) -> Float[Array, " N"]:
    """The greatest logit of each query head over batch, queries and the keys they see.

    What QK-clip looks at (Kimi K2, arXiv 2507.20534). Shapes as for `attend`.
    """
    mask = Full() if mask is None else mask
    T, N = q.shape[1], q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def row(q_row):
        q_row, index = q_row
        logits = _logits(q_row[:, None], k, scale, None)
        seen = mask.visible(index[None], jnp.arange(k.shape[1]), (T, k.shape[1]))
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
        return logits.max((0, 3, 4)).reshape(N)

    rows = (jax.lax.stop_gradient(q).swapaxes(0, 1), jnp.arange(T))
    k = jax.lax.stop_gradient(k)
    return jax.lax.map(row, rows, batch_size=min(T, 128)).max(0)


def _logits(q, k, scale, softcap):
    """Scaled and capped products in float32: `B T N H`, `B S K H` -> `B K G T S`.

    Heads lead and the `G` queries of a key head lie below one another, so that it is one
    batched product of plain matrices, which a CPU does twice as fast as the einsum.
    """
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    q = (q * scale).swapaxes(1, 2).reshape(B, K, N // K * T, H)
    logits = jnp.matmul(q, k.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    logits = logits.reshape(B, K, N // K, T, S)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _rows(q, index, k, v, bias, mask, T, scale, softcap):
    """Attention of the queries `q`, which stand at `index` among all `T`."""
    (B, t, N, H), (_, S, K, _) = q.shape, k.shape
    logits = _logits(q, k, scale, softcap)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (bias.shape[0], N, *bias.shape[2:]))
        logits += bias.reshape(-1, K, N // K, t, S)
    seen = None
    if not isinstance(mask, Full):
        seen = mask.visible(index, jnp.arange(S), (T, S))[:, None, None]
        logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    if seen is not None:
        weights = jnp.where(seen, weights, 0)
    total = weights.sum(-1, keepdims=True)
    total = jnp.where(total > 0, total, 1)  # A row that sees nothing is 0.
    # Divided after the product, where there are H numbers a row and not S.
    weights = weights.astype(v.dtype).reshape(B, K, N // K * t, S)
    y = jnp.matmul(weights, v.swapaxes(1, 2), preferred_element_type=jnp.float32)
    y = y.reshape(B, K, N // K, t, H) / total
    return y.reshape(B, N, t, H).swapaxes(1, 2).astype(v.dtype)


def _check(q, k, v, mask, bias):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape} and must be [B, T, heads, H]")
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    if k.shape != v.shape:
        raise ValueError(f"k {k.shape} and v {v.shape} must have one shape")
    if k.shape[0] != B or k.shape[3] != H:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch and head size")
    if N % K:
        raise ValueError(f"q has {N} heads, which must be a multiple of the {K} of k")
    if bias is not None:
        whole = (B, N, T, S)
        if bias.ndim != 4 or any(
            a not in (1, b) for a, b in zip(bias.shape, whole, strict=True)
        ):
            raise ValueError(f"bias has shape {bias.shape} and must broadcast to {whole}")
    mask.check(T, S)
