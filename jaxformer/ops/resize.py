"""Grids at another resolution, by the weights that PyTorch uses.

Position embeddings learned for 16 x 16 patches serve 24 x 10 only where they are
resampled as their model's own code does, and `jax.image.resize` is not that: its bicubic
kernel has another sharpness where nothing is antialiased, and another border. The weights
here are NumPy's, made while tracing: at run time there are two products of matrices.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Method = Literal["bicubic", "bilinear"]


def resize(
    x: Float[Array, "*B Y X D"],
    shape: tuple[int, int],
    *,
    method: Method = "bicubic",
    antialias: bool = False,
) -> Float[Array, "*B y x D"]:
    """Resamples grids as `torch.nn.functional.interpolate(..., align_corners=False)`.

    Equal to it to 1e-5 of float32 values around 1, for `size=shape` (the `scale_factor`
    of DINOv2's first release, which is not its size's ratio, is not here). Bicubic
    without antialias is ViT's, CLIP's, SigLIP's, DINOv2's and MAE's; with it that of
    DINOv2 with registers; bilinear with it SigLIP 2's.

    Args:
      x: channels last. Computed in float32, and returned in its own dtype.
      shape: rows and columns to make.
      method: the kernel, see `weights`.
      antialias: widens the kernel where the grid shrinks.

    Raises:
      ValueError: an unknown method, or a size below 1.

    Example:
      >>> resize(jnp.ones((16, 16, 768)), (24, 10)).shape
      (24, 10, 768)
    """
    rows, columns = (
        jnp.asarray(weights(old, new, method=method, antialias=antialias))
        for old, new in zip(x.shape[-3:-1], shape, strict=True)
    )
    y = jnp.einsum(
        "yY,xX,...YXD->...yxD",
        rows,
        columns,
        x.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return y.astype(x.dtype)


def weights(
    old: int, new: int, *, method: Method = "bicubic", antialias: bool = False
) -> np.ndarray:
    """The weight of each of `old` samples in each of `new`: `[new, old]` float32.

    Rows sum to 1. Sample i of n lies at (i + 1/2) / n. Keys' cubic kernel has a = -0.75
    (with antialias -0.5, as Pillow's); without antialias samples beyond the border are
    those at the border, and with it they are left out and the rest weighs more.

    Raises:
      ValueError: an unknown method, or a size below 1.
    """
    if method not in ("bicubic", "bilinear"):
        raise ValueError(f"method={method!r} must be bicubic or bilinear")
    if old < 1 or new < 1:
        raise ValueError(f"a grid of {old} samples cannot become one of {new}; both are >= 1")
    kernel, reach = _kernel(method, -0.5 if antialias else -0.75)
    # PyTorch rounds the ratio, and then a place once, to float32: we land where it does.
    scale = np.float64(np.float32(old) / np.float32(new))
    middle = scale * (np.arange(new)[:, None] + 0.5)
    middle = (middle if antialias else middle - 0.5).astype(np.float32)
    if antialias:
        samples, wide = np.arange(old)[None], max(scale, 1.0)
        out = kernel((samples + 0.5 - middle) / wide)
        out /= out.sum(1, keepdims=True)
    else:
        samples = np.floor(middle).astype(int) + np.arange(1 - reach, reach + 1)[None]
        out, rows = np.zeros((new, old)), np.arange(new)[:, None]
        np.add.at(out, (rows, samples.clip(0, old - 1)), kernel(samples - middle))
    return out.astype(np.float32)


def _kernel(method: Method, a: float) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """The weight at a distance in samples, and beyond how many samples it is 0."""

    def linear(x):
        return np.maximum(1 - np.abs(x), 0)

    def cubic(x):  # Keys, "Cubic convolution interpolation", 1981, with its a free.
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0))

    return (cubic, 2) if method == "bicubic" else (linear, 1)
