"""`attend`: softmax attention, its meaning, and the choice of who computes it."""

import contextlib
import math
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.kernels.case import Case, Known, Side
from jaxformer.ops import check, choose, dense, padding
from jaxformer.ops.alibi import Alibi
from jaxformer.ops.choose import How, Impl, Problem
from jaxformer.ops.mask import Causal, Full, Mask
from jaxformer.ops.norm import Norm
from jaxformer.ops.spread import spread

# For more queries than so many, no kernel is written out tile by tile.
MOST_KNOWN = 4096

Norms = tuple[Norm | None, Norm | None]
Angles = Float[Array, "#B T h"] | tuple[Float[Array, "#B T h"], Float[Array, "#B S h"]]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "#B #N T S"] | Alibi | None = None,
    norm: Norms | None = None,
    angles: Angles | None = None,
    impl: Impl = "auto",
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped keys: `softmax(q k / sqrt(H) + bias) v`.

    The softmax runs in float32, products in the dtype of `q`. A query that the mask
    leaves without keys gives 0, with gradient 0; what lies in padding, NaN included, is
    never looked at where the mask tells what is padding (`Mask.pads`). It can be
    differentiated in reverse, forward and again. Under the rules of `sharding.use` each
    device computes its batch, heads and queries.

    Args:
      q: queries. `N` is a multiple of `K`; queries `n` share key head `n // (N // K)`.
      k: keys.
      v: values.
      mask: which keys a query sees, see `jaxformer.ops.mask`; None is all of them.
      scale: factor of the products, `H ** -0.5` if not given.
      softcap: bounds logits smoothly to +- softcap: `softcap * tanh(logits / softcap)`.
      bias: added to the logits after scale and cap; or ALiBi, whose slopes are constants.
      norm: applied to queries and keys before all else, a kernel does it on the way.
      angles: by which both are rotated after that, see `jaxformer.ops.rotary`; a pair
        where keys have others than queries. They are constants: they get no gradient.
      impl: "auto" is a kernel on a TPU or NVIDIA GPU that is compiled for, and XLA
        elsewhere; see `explain`. "reference" holds all `T * S` logits, "chunked" a few
        rows of them, forward and backward; both are XLA. "tpu", "gpu" are the kernels,
        interpreted (slowly) on other platforms, and "cudnn" is cuDNN.

    Raises:
      ValueError: shapes that do not agree, or an unknown `impl`.
      NotImplementedError: a named `impl` cannot do this.
    """
    options = {"mask": mask, "scale": scale, "softcap": softcap, "bias": bias}
    return _attend(q, k, v, norm=norm, angles=angles, impl=impl, lse=False, **options)[0]


def attend_lse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "#B #N T S"] | Alibi | None = None,
    norm: Norms | None = None,
    angles: Angles | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """`attend`, and the log of the sum of the exponentials of each row's logits.

    With it, attention to two parts of the keys becomes attention to both: with `out` and
    `lse` of each and `both = logaddexp(lse_a, lse_b)`, it is
    `exp(lse_a - both) * out_a + exp(lse_b - both) * out_b` (weights `[B, N, T]` laid along
    `[B, T, N, 1]`). A row without keys has `lse = -inf`. It is float32 and differentiable.
    """
    options = {"mask": mask, "scale": scale, "softcap": softcap, "bias": bias}
    return _attend(q, k, v, norm=norm, angles=angles, impl=impl, lse=True, **options)


def explain(
    q: Sequence[int],
    k: Sequence[int],
    dtype: DTypeLike = jnp.bfloat16,
    *,
    platform: str = "tpu",
    impl: Impl = "auto",
    lse: bool = False,
    **options,
) -> str:
    """Says who would compute an attention on a platform, and why not the others.

    `explain((8, 197, 12, 64), (8, 197, 12, 64), platform="cuda")`; on one device. Where this
    process has no GPU, one of CUDA is taken to have cuDNN.

    Args:
      q: the shape of the queries, `B T N H`.
      k: the shape of the keys, `B S K H`.
      dtype: of all three.
      platform: "tpu", "cuda" (or "gpu") or "cpu".
      impl: as for `attend`.
      lse: whether it is `attend_lse` that is called.
      **options: as for `attend`, from `mask` to `angles`.
    """
    platform = {"gpu": "cuda"}.get(platform, platform)
    if platform not in ("tpu", "cuda", "cpu"):
        raise ValueError(f"platform={platform!r} must be one of tpu, cuda, gpu, cpu")
    choices, here = {}, platform != "cuda" or jax.default_backend() == "gpu"

    def both(q, k, v):
        problem, _ = _problem(q, k, v, impl=impl, lse=lse, **options)
        if impl in choose.XLA:
            choices["forward"] = choices["backward"] = choose.Choice(impl, {})
            return
        (out, total), choices["forward"] = choose.forward(problem, platform, here)
        given = (out, total, out, total if lse else None)
        _, choices["backward"] = choose.backward(problem, *given, platform, here)

    x = (jax.ShapeDtypeStruct(tuple(shape), dtype) for shape in (q, k, k))
    jax.eval_shape(both, *x)
    return "\n".join(f"{name}: {choice}" for name, choice in choices.items())


def max_logit(
    q, k, *, mask: Mask | None = None, scale=None, norm=None, angles=None
) -> Float[Array, " N"]:
    """The greatest logit of each query head over batch, queries and the keys they see.

    What QK-clip looks at (Kimi K2, arXiv 2507.20534). Shapes and options as for `attend`.
    """
    mask = Full() if mask is None else mask
    check.shapes(q, k, k, mask, None, norm, angles)
    check.mask_rows(mask, q, k)
    (_, T, N, H), S = q.shape, k.shape[1]
    case = Case(*_sides(norm, angles), scale=_scale(scale, H))
    q, k = (jax.lax.stop_gradient(x) for x in (q, k))
    q, k = dense.prepare(case.q, q), dense.prepare(case.k, k)

    def row(q_row):
        q_row, index = q_row
        logits = dense.products(q_row[:, None], k, case)
        seen = mask.visible(index[None], jnp.arange(S), (T, S))
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
        return logits.max((0, 3, 4)).reshape(N)

    rows = (q.swapaxes(0, 1), jnp.arange(T))
    return jax.lax.map(row, rows, batch_size=min(T, 128)).max(0)


def weights(
    q, k, *, mask: Mask | None = None, scale=None, bias=None, norm=None, angles=None
) -> Float[Array, "B N T S"]:
    """How much each query takes of each key, all of them at once: for pictures.

    The rows are float32 and sum to 1; one without keys is 0. Shapes and options as for
    `attend`, whose result are the values that these weigh; `bias` is an array.
    """
    mask = Full() if mask is None else mask
    check.shapes(q, k, k, mask, bias, norm, angles)
    check.mask_rows(mask, q, k)
    if isinstance(bias, Alibi):
        raise ValueError("bias: weights takes an array, and this is an Alibi")
    (B, T, N, H), S = q.shape, k.shape[1]
    case = Case(*_sides(norm, angles), scale=_scale(scale, H))
    logits = dense.products(dense.prepare(case.q, q), dense.prepare(case.k, k), case)
    logits = logits.reshape(B, N, T, S)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    seen = mask.visible(jnp.arange(T), jnp.arange(S), (T, S))[:, None]
    found = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
    # Of a row without keys, or whose bias leaves none, nothing.
    return jnp.where(seen & jnp.isfinite(found), found, 0)


def _attend(q, k, v, *, impl, lse, **options):
    problem, shown = _problem(q, k, v, impl=impl, lse=lse, **options)
    p = problem
    if impl in choose.XLA:  # Plain XLA: JAX differentiates it, and cuts it over a mesh.
        out, lse = choose.XLA[impl].forward(p.q, p.k, p.v, p.case, p.mask)
    else:
        out, lse = spread(p.q, p.k, p.v, p.case, p.mask, p.how)
    if shown is not None:  # Nor does a gradient come in through padding.
        rows = shown[0]
        out = jnp.where(rows[:, :, None, None], out, 0)
        lse = jnp.where(rows[:, None], lse, -jnp.inf)
    return out, lse


def _problem(
    q,
    k,
    v,
    *,
    impl,
    lse,
    mask=None,
    scale=None,
    softcap=None,
    bias=None,
    norm=None,
    angles=None,
):
    """What is asked for, with padding made 0, and who is no padding, if one can tell."""
    mask = Full() if mask is None else mask
    check.shapes(q, k, v, mask, bias, norm, angles)
    if impl not in choose.IMPLS:
        raise ValueError(f"impl={impl!r} must be one of {', '.join(choose.IMPLS)}")
    (_, T, _, H), S = q.shape, k.shape[1]
    plain = isinstance(mask, Causal) and isinstance(mask.offset, int) and mask.offset == 0
    intervals, told, why_not = None, None, None
    if impl != "reference":
        try:
            with _now(mask):
                intervals = mask.intervals(T, S)
            told = known(mask, intervals)
            if intervals is not None and not isinstance(intervals, Tracer):
                intervals = jnp.asarray(np.asarray(intervals))  # Of no devices either.
            kept = None
        except NotImplementedError as error:
            kept, why_not = mask, str(error)
    else:
        kept = None if isinstance(mask, Full) else mask
    if intervals is not None:
        check.rows("mask", intervals.shape, q)
    elif kept is not None:
        check.mask_rows(kept, q, k)
    shown = None
    if mask.pads:
        shown = padding.shown(kept, intervals, T, S)
        q, k, v = padding.blank(q, k, v, *shown)
    slopes, offset = None, 0
    if isinstance(bias, Alibi):
        slopes = jax.lax.stop_gradient(jnp.asarray(bias.slopes, jnp.float32))
        bias, offset = None, bias.offset
    case = Case(
        *_sides(norm, angles),
        intervals=intervals,
        known=told,
        bias=bias,
        slopes=slopes,
        offset=offset,
        scale=_scale(scale, H),
        softcap=_softcap(softcap),
    )
    how = How(impl, causal=plain, lse=lse, why_not=why_not)
    return Problem(q, k, v, case, kept, how), shown


@contextlib.contextmanager
def _now(mask: Mask):
    """What a mask without traced data is asked is computed, and not traced.

    It belongs to no mesh: JAX has no eager arrays in a `jax.shard_map`.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(mask)):
        yield
    else:
        nowhere = jax.sharding.AbstractMesh((), ())
        with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(nowhere):
            yield


def known(mask: Mask, intervals) -> Known | None:
    """The intervals of a mask without an array, the same for all rows of the batch.

    A kernel may be written for them.
    """
    data = any(not isinstance(leaf, int) for leaf in jax.tree.leaves(mask))
    if data or intervals is None or intervals.shape[0] > 1 or intervals.shape[2] > MOST_KNOWN:
        return None
    return Known(np.asarray(intervals)[0])


def _scale(scale, H: int) -> float:
    if scale is None:
        return H**-0.5
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale must be a number, got {scale!r}; multiply q by an array")
    return float(scale)


def _softcap(softcap) -> float | None:
    if softcap is None:
        return None
    if not isinstance(softcap, numbers.Real) or not 0 < float(softcap) < math.inf:
        raise ValueError(f"softcap must be a number above 0, got {softcap!r}")
    return float(softcap)


def _sides(norm, angles) -> tuple[Side, Side]:
    q_norm, k_norm = norm or (None, None)
    q_angles, k_angles = angles if isinstance(angles, tuple) else (angles, angles)
    return _side(q_norm, q_angles), _side(k_norm, k_angles)


def _side(norm: Norm | None, angles) -> Side:
    weights = {}
    if norm is not None:
        bias = None if norm.bias is None else jnp.asarray(norm.bias, jnp.float32)
        weights = {"scale": jnp.asarray(norm.scale, jnp.float32), "shift": bias}
        weights |= {"centered": norm.centered, "epsilon": norm.epsilon}
    if angles is None:
        return Side(**weights)
    angles = jax.lax.stop_gradient(jnp.asarray(angles, jnp.float32))
    return Side(cos=jnp.cos(angles), sin=jnp.sin(angles), **weights)
