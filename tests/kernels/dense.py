"""Attention with all of its logits, which kernels are held against, and its problems."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.kernels.case import Case, Gradients, Side


def prepared(x, side: Side):
    """Norm and rotation, as `Case` has them."""
    x, wide = x.astype(jnp.float32), (None,) * 3
    if side.scale is not None:
        x -= x.mean(-1, keepdims=True) if side.centered else 0
        x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + side.epsilon)
        x = x * side.scale[wide] + (0 if side.shift is None else side.shift[wide])
    if side.cos is not None:
        (a, b), cos, sin = jnp.split(x, 2, -1), side.cos[:, :, None], side.sin[:, :, None]
        x = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return x


def dense(q, k, v, case: Case, rounded="float32"):
    """Attention with all of its logits, in float32, as `Case` describes it.

    What its products take is `rounded` to a dtype before, and so is what its sum takes.
    """
    (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
    q, k = prepared(q, case.q), jnp.repeat(prepared(k, case.k), N // K, 2)
    q, k = (x.astype(rounded).astype(jnp.float32) for x in (q, k))
    y = jnp.einsum("BTNH,BSNH->BNTS", q, k) * case.scale
    if case.softcap is not None:
        y = case.softcap * jnp.tanh(y / case.softcap)
    if case.bias is not None:
        y += case.bias.astype(jnp.float32)
    t, s = jnp.arange(T)[:, None], jnp.arange(S)[None]
    if case.slopes is not None:
        y -= case.slopes[None, :, None, None] * jnp.abs(t + case.offset - s)[None, None]
    if case.intervals is not None:
        ends = case.intervals[..., None]
        pairs = zip(ends.swapaxes(0, 1)[::2], ends.swapaxes(0, 1)[1::2], strict=True)
        seen = sum((a <= s[None]) & (s[None] < z) for a, z in pairs) > 0
        y = jnp.where(seen[:, None], y, -jnp.inf)
    top = y.max(-1, keepdims=True)
    weights = jnp.exp(y - jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top)))
    weights = weights.astype(rounded).astype(jnp.float32)
    total = weights.sum(-1, keepdims=True)
    some = total > 0
    weights /= jnp.where(some, total, 1)
    values = jnp.repeat(v.astype(jnp.float32), N // K, 2)
    lse = jnp.where(some, jnp.log(jnp.where(some, total, 1)) + jax.lax.stop_gradient(top), 0)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights, values)
    return out, jnp.where(some, lse, -jnp.inf)[..., 0]


@dataclasses.dataclass(frozen=True)
class Sizes:
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: str = "float32"

    def arrays(self):
        """q, k, v and the gradients by out and by lse."""
        B, T, S, N, K, H = dataclasses.astuple(self)[:6]
        shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
        arrays = [draw(i, *shape).astype(self.dtype) for i, shape in enumerate(shapes)]
        return *arrays, draw(4, B, N, T)


def draw(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def side(seed: int, T: int, H: int, norm: bool, shift=False, rotary=False, centered=False):
    angles = draw(seed, 1, T, H // 2)
    return Side(
        1 + 0.3 * draw(seed + 1, H) if norm else None,
        draw(seed + 2, H) if shift else None,
        jnp.cos(angles) if rotary else None,
        jnp.sin(angles) if rotary else None,
        centered,
        1e-3,
    )


def window(T: int, left: int, right: int):
    t = jnp.arange(T)
    return jnp.stack([t - left, t + right])[None]


def spans(T: int, S: int):
    """Two intervals a row that overlap, touch, are empty, reversed, or outside."""
    draws = np.random.default_rng(0).integers(-9, S + 9, (2, 4, T))
    draws[:, :, : T // 3] = np.array([0, 20, S - 4, S + 30])[None, :, None]
    draws[1, :, T // 2 :] = 5  # Rows without keys.
    return jnp.asarray(draws, jnp.int32)


def differentiated(q, k, v, case: Case, d_out, d_lse, formula=dense):
    """out, lse and gradients of `formula`, by JAX; rows without keys have none by lse."""
    fixed = {"intervals": case.intervals}  # Integers are not differentiated by.

    def f(q, k, v, case):
        out, lse = formula(q, k, v, dataclasses.replace(case, **fixed))
        loss = (out * d_out.astype(jnp.float32)).sum()
        return loss + (jnp.where(lse == -jnp.inf, 0, lse) * d_lse).sum(), (out, lse)

    floats = dataclasses.replace(case, intervals=None)
    (q, k, v, case), (out, lse) = jax.grad(f, (0, 1, 2, 3), has_aux=True)(q, k, v, floats)
    norms = (case.q.scale, case.q.shift, case.k.scale, case.k.shift)
    return out, lse, Gradients(q, k, v, case.bias, *norms)
