"""What `attend` refuses: one sentence that names the argument, its shape and the rule."""

import jax
import jax.numpy as jnp

from jaxformer.ops.alibi import Alibi
from jaxformer.ops.mask import Mask


def shapes(q, k, v, mask, bias, norm, angles) -> None:
    """Raises ValueError where the arguments of `attend` do not agree."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not hasattr(x, "ndim") or x.ndim != 4:
            found = getattr(x, "shape", type(x).__name__)
            raise ValueError(f"{name} has shape {found} and must be [B, T, heads, H]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} is {x.dtype} and must be of floating point")
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    if k.shape != v.shape:
        raise ValueError(f"k {k.shape} and v {v.shape} must have one shape")
    if k.shape[0] != B or k.shape[3] != H:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch and head size")
    if not (B and T and S and N and K and H):
        raise ValueError(f"q {q.shape} and k {k.shape} must have one of each at least")
    if N % K:
        raise ValueError(f"q has {N} heads, which must be a multiple of the {K} of k")
    _bias(bias, (B, N, T, S))
    if norm is not None:
        _norm(norm, H)
    if angles is not None:
        _angles(angles, q, k)
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask is {type(mask).__name__} and must be one of ops.mask; of an array, add "
            "jnp.where(seen, 0, -jnp.inf) as bias"
        )
    mask.check(T, S)


def rows(name: str, shape, q) -> None:
    """Raises ValueError where an array has another batch than 1 or that of `q`."""
    if shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"{name} has {shape[0]} rows and must have 1 or {q.shape[0]}, as q {q.shape}"
        )


def mask_rows(mask, q, k) -> None:
    """`rows` of a mask that is not made of intervals."""
    T, S = q.shape[1], k.shape[1]
    place = jax.ShapeDtypeStruct((1,), "int32")
    seen = jax.eval_shape(lambda at: mask.visible(at, at, (T, S)), place)
    rows("mask", seen.shape, q)


def _bias(bias, whole) -> None:
    if isinstance(bias, Alibi):
        if bias.slopes.shape != (whole[1],):
            raise ValueError(
                f"bias: Alibi.slopes has shape {bias.slopes.shape} and must be ({whole[1]},), "
                "one for each head of q"
            )
    elif bias is not None:
        # A bias is as large as the logits: of what may be 1, only batch and heads.
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise ValueError(
                f"bias is {bias.dtype} and must be of floating point, as it is added to logits"
            )
        fits = bias.ndim == 4 and bias.shape[2:] == whole[2:]
        if not fits or any(a not in (1, b) for a, b in zip(bias.shape, whole, strict=True)):
            raise ValueError(
                f"bias has shape {bias.shape} and must broadcast to {whole} in batch and heads"
            )


def _norm(norm, H: int) -> None:
    if not isinstance(norm, tuple) or len(norm) != 2:
        raise ValueError(f"norm must be a pair, for queries and for keys; got {norm!r}")
    for name, side in zip("qk", norm, strict=True):
        for part in ("scale", "bias"):
            x = None if side is None else getattr(side, part)
            if x is not None and x.shape != (H,):
                raise ValueError(
                    f"norm: the {part} for {name} has shape {x.shape} and must be ({H},), "
                    "the head size"
                )
        if side is not None and not side.epsilon > 0:
            raise ValueError(f"norm: epsilon={side.epsilon} for {name} must be above 0")


def _angles(angles, q, k) -> None:
    pair = angles if isinstance(angles, tuple) else (angles, angles)
    if len(pair) != 2 or any(turn is None for turn in pair):
        raise ValueError(f"angles must be one array or a pair of them, got {pair!r}")
    for name, turn, x in zip("qk", pair, (q, k), strict=True):
        B, T, _, H = x.shape
        if (
            H % 2
            or turn.ndim != 3
            or turn.shape[0] not in (1, B)
            or turn.shape[1:] != (T, H // 2)
        ):
            raise ValueError(
                f"angles for {name} have shape {turn.shape} and must be [1 or {B}, {T}, "
                f"{H} / 2], an angle for each pair of each token of {name} {x.shape}"
            )
