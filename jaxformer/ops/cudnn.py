"""Attention by cuDNN, for the cases that it serves best: plain, long and in half precision.

Its logsumexp comes rounded to half precision, too coarse to continue from: `lse` is not
given, and `backward` runs the forward pass again, then cuDNN's own.
"""

import jax
import jax.numpy as jnp

from jaxformer.kernels.case import Case, Gradients

# Below so many tokens its tiles are too few to fill a device.
SHORTEST = 1024


def refuse(q, k, case: Case, causal: bool) -> str | None:
    """Why cuDNN is not to be asked, or None; it depends on shapes and options alone."""
    (_, T, _, H), S = q.shape, k.shape[1]
    masked = case.intervals is not None and not causal
    reasons = {
        "a mask that is not causal": masked,
        "causal with T != S": causal and T != S,
        "QK-norm or angles": not (case.q.plain and case.k.plain),
        "bias": case.bias is not None or case.slopes is not None,
        "softcap": case.softcap is not None,
        f"dtype {q.dtype}": q.dtype not in (jnp.bfloat16, jnp.float16),
        f"head size {H}, not a multiple of 8 up to 128": bool(H % 8) or H > 128,
        f"T={T}, S={S} below {SHORTEST}": min(T, S) < SHORTEST,
        f"T={T}, S={S} not multiples of 64": bool(T % 64 or S % 64),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return "cuDNN is not asked for " + ", ".join(found) if found else None


def forward(q, k, v, case: Case, causal: bool, here: bool = True):
    """As `kernels.case`, but `lse` is no number: nobody may look at it."""
    (B, T, N, _) = q.shape
    return run(q, k, v, case, causal, here), jnp.full((B, N, T), jnp.nan)


def backward(q, k, v, case: Case, causal: bool, d_out, here: bool = True) -> Gradients:
    """Gradients by cuDNN's own rule."""
    _, pull = jax.vjp(lambda q, k, v: run(q, k, v, case, causal, here), q, k, v)
    return Gradients(*pull(d_out))


def run(q, k, v, case: Case, causal: bool, here: bool = True):
    """Calls cuDNN; NotImplementedError where this process has none.

    Of a machine that is not `here` only the shape is asked for, of XLA, and its cuDNN not.
    """
    reason = refuse(q, k, case, causal)
    if reason:
        raise NotImplementedError(reason)
    try:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=case.scale,
            is_causal=causal,
            implementation="cudnn" if here else "xla",
        )
    except (RuntimeError, ValueError) as error:
        raise NotImplementedError(f"cuDNN refuses: {error}") from error
