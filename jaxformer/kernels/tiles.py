"""How large the kernels' tiles are, by device, head size and length."""

import dataclasses

import jax.numpy as jnp

# Most bytes of a step's keys where a list tells which are seen, of 64 MiB of VMEM.
LISTED = 8 * 2**20
LEAST = 64 * 2**20  # Bytes of VMEM of the chips that have the least, a v5p and a tpu7x.


def up(n: int, multiple: int) -> int:
    """`n` rounded up."""
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Tpu:
    """How a TPU kernel cuts its work, measured by the compiler's schedules.

    A grid step takes `queries`, in chunks of `chunk`, and heads that fill about `lanes`;
    a tile is a chunk by `keys`. Where a list tells what is seen, it does so of `listed` keys
    at a time, some tiles. A chain of tiles waits for itself, so `chains` of them
    (heads, chunks) go side by side, and products are asked for `ahead` of the softmax
    that takes them. Up to `unrolled` tiles are written out without a loop; where the
    intervals are known, up to `most` logits. What is done to rows before and after the tiles
    is written out for up to `written` of them, counted in each window: of more, libtpu takes
    minutes, and of fewer in a loop the kernel is slower.
    """

    queries: int
    chunk: int
    keys: int
    lanes: int
    chains: int = 4
    ahead: int = 2
    unrolled: int = 32
    most: int = 0
    written: int = 8192
    listed: int = 0


def tpu(
    T: int,
    S: int,
    H: int,
    *,
    masked: bool,
    backward: bool,
    itemsize: int = 2,
    vmem: int = LEAST,
) -> Tpu:
    """For `T` queries and `S` keys of head size `H`, of `itemsize` bytes a number."""
    many = {"unrolled": 8, "written": 4096} if backward else {}
    if masked:
        size = 256 if T < 2048 else 512
        queries = min(T, size)
        # Keys lie in VMEM whole. The gradients of both, which grow there, take three times
        # their room; and of float32 all else is twice as large too.
        most, ahead, room = (4 * H, 3, LISTED // 4) if backward else (8 * H, 6, LISTED)
        most = min(most, 1024)
        room = room * vmem // LEAST * 2 // itemsize
        lanes = max(256, min(most, room // (S * itemsize)))
        return Tpu(queries, queries, 256, lanes, ahead=ahead, listed=size, **many)
    if T <= 512 and S == 512 and not backward:
        return Tpu(T, T, 256, 512, ahead=6)
    if T <= 512:
        return Tpu(T, T, min(S, 512), 512, ahead=3, **many)
    queries = min(T, up(-(-T // -(-T // 1024)), 256))
    whole = T if queries == T else 256
    chunk = 512 if queries % 512 == 0 else whole
    if T <= 1024 and not backward:
        return Tpu(queries, chunk, min(S, 512), 4 * H, chains=8, **many)
    return Tpu(queries, chunk, min(S, 512), max(128, 2 * H), **many)


def tpu_known(T: int, S: int, H: int, *, backward: bool) -> Tpu:
    """For intervals that are known: all queries in one step, written out tile by tile."""
    chunk = T if T <= 256 else 256
    lanes, most = (2 * H, 3_500_000) if backward else (min(8 * H, 1024), 7_000_000)
    return Tpu(up(T, chunk), chunk, 256, max(128, lanes), chains=64, ahead=6, most=most)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A Triton kernel's tile: queries by keys, and how many warps and stages work on it."""

    queries: int
    keys: int
    warps: int
    stages: int


# By kernel and head size up to. As Triton and ptxas compile them (sm_80, 86, 89, 90, 100,
# 120), each fits its GPU's shared memory, 99 KiB on the least, and on sm_90 next to no
# registers spill. Chosen by that; not timed.
GPU = {
    ("forward", 64): Gpu(128, 64, 4, 3),
    ("forward", 128): Gpu(128, 64, 8, 3),
    ("forward", 256): Gpu(64, 32, 8, 2),
    ("queries", 64): Gpu(64, 64, 4, 3),
    ("queries", 128): Gpu(64, 64, 8, 2),
    ("queries", 256): Gpu(64, 32, 8, 1),
    ("keys", 64): Gpu(64, 64, 4, 3),
    ("keys", 128): Gpu(64, 64, 8, 2),
    ("keys", 256): Gpu(16, 64, 8, 2),
}
# With a norm, angles or a bias, which a tile holds beside its heads.
GPU_LADEN = {
    ("forward", 64): Gpu(128, 64, 8, 2),
    ("forward", 128): Gpu(128, 32, 8, 2),
    ("forward", 256): Gpu(64, 32, 8, 1),
    ("queries", 64): Gpu(64, 64, 8, 2),
    ("queries", 128): Gpu(64, 32, 8, 2),
    ("queries", 256): Gpu(32, 32, 8, 1),
    ("keys", 64): Gpu(64, 64, 8, 2),
    ("keys", 128): Gpu(32, 64, 8, 2),
    ("keys", 256): Gpu(32, 32, 8, 1),
}


def gpu(kernel: str, T: int, S: int, H: int, dtype, *, laden: bool) -> Gpu:
    """For one of the kernels "forward", "queries" and "keys" (the two of the gradients)."""
    if jnp.dtype(dtype).itemsize == 4:
        tile = Gpu(32, 32, 8, 1) if H <= 128 else Gpu(16, 16, 8, 1)
    else:
        table = GPU_LADEN if laden else GPU
        tile = table[kernel, next(size for size in (64, 128, 256) if size >= H)]
    # A short array is one tile, of at least the 16 that tensor cores take.
    queries, keys = (max(16, 1 << (n - 1).bit_length()) for n in (T, S))
    return dataclasses.replace(
        tile, queries=min(tile.queries, queries), keys=min(tile.keys, keys)
    )
