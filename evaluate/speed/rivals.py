"""Attention of other hands, on `[B, T, N, H]` as ours is: of jax, XLA, cuDNN, tokamax."""

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import flash_attention, splash_attention

# Splash's best (queries, keys, keys at a time) of a block: fewest cycles for v6e at H = 64,
# found by `attention_tpu.search` among 256 (for T = 256), 1,024, 2,048 and T.
BLOCKS: dict[tuple[str, int], tuple[int, int, int]] = {
    ("forward", 256): (256, 256, 256),
    ("forward", 1024): (1024, 1024, 1024),
    ("forward", 2048): (2048, 2048, 1024),
    ("forward", 4096): (2048, 4096, 1024),
    ("backward", 256): (256, 256, 256),
    ("backward", 1024): (1024, 1024, 1024),
    ("backward", 2048): (2048, 2048, 1024),
    ("backward", 4096): (2048, 2048, 2048),
}


def splash(T: int, mask: np.ndarray | None = None) -> Callable:
    """jax's splash attention with its best block sizes; smaller ones where it may skip some."""
    if mask is not None:
        return splash_with(T, (min(T, 512),) * 3, mask=mask)
    forward, backward = (BLOCKS.get((way, T)) for way in ("forward", "backward"))
    forward = forward or (min(T, 1024),) * 3
    return splash_with(T, forward, backward or (min(T, 1024),) * 3, mask=mask)


def splash_with(T: int, forward, backward=None, *, mask: np.ndarray | None = None) -> Callable:
    """jax's splash attention with given (queries, keys, keys at a time) of a block."""
    (bq, bk, bc), (cq, ck, cc) = forward, backward or forward
    sizes = splash_attention.BlockSizes(bq, bk, bc, cq, ck, cc, use_fused_bwd_kernel=True)

    def attend(q, k, v):
        whole = splash_attention.FullMask((T, T))
        one = whole if mask is None else splash_attention.NumpyMask(mask)
        heads = splash_attention.MultiHeadMask([one] * q.shape[2])
        kernel = splash_attention.make_splash_mha_single_device(heads, block_sizes=sizes)
        q = q * q.shape[-1] ** -0.5
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jnp.asarray(jax.vmap(kernel)(q, k, v)).swapaxes(1, 2)

    return attend


def flash(T: int) -> Callable:
    """jax's flash attention, the elder of its two, by blocks of up to 1,024."""
    b = min(T, 1024)
    names = [f.name for f in dataclasses.fields(flash_attention.BlockSizes)]
    sizes = flash_attention.BlockSizes(**{n: 1 if n == "block_b" else b for n in names})

    def attend(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        y = flash_attention.flash_attention(q, k, v, sm_scale=scale, block_sizes=sizes)
        return y.swapaxes(1, 2)

    return attend


def named(implementation: str) -> Callable:
    """`jax.nn.dot_product_attention` by "xla" or "cudnn"; a mask is boolean `[1, T, S]`."""

    def attend(q, k, v, mask=None):
        mask = None if mask is None else mask[:, None]
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            implementation=implementation,  # pyright: ignore
        )

    return attend


def tokamax() -> Callable:
    """tokamax's attention; ImportError where it is not installed."""
    module = importlib.import_module("tokamax")

    def attend(q, k, v, mask=None):
        mask = None if mask is None else mask[:, None]
        return module.dot_product_attention(q, k, v, mask=mask)

    return attend


def exact(q, k, v, mask=None):
    """Attention row by row, for float32: what others are checked against."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def row(row):
        q, seen = row
        logits = jnp.einsum("BNH,BSNH->BNS", q, k, precision="highest") * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        return jnp.einsum("BNS,BSNH->BNH", weights, v, precision="highest")

    T, S = q.shape[1], k.shape[1]
    seen = jnp.ones((T, 1, 1, S), bool) if mask is None else mask[0, :, None, None]
    return jax.lax.map(row, (q.swapaxes(0, 1), seen), batch_size=None).swapaxes(0, 1)
