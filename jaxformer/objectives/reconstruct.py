"""Reconstruction: the pixels of the patches that a model was not shown.

He et al. 2022, "Masked autoencoders are scalable vision learners" (arXiv:2111.06377).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.errors import InputError
from jaxformer.metrics import Mean, Metrics
from jaxformer.ops.patches import patchify

EPSILON = 1e-6


def targets(patches: Float[Array, "B T P"], *, normalize: bool = True) -> Float[Array, "B T P"]:
    """What a model is to predict: the pixels of each patch, in float32.

    With `normalize` each patch, all its channels together, has mean 0 and variance 1:
    the unbiased variance (over P - 1), to which 1e-6 is added, as in the original.

    Raises:
      ValueError: patches of a single number, which has no variance.
    """
    x = patches.astype(jnp.float32)
    if not normalize:
        return x
    mean, deviation = _moments(x)
    return (x - mean) / deviation


def drawn(
    prediction: Float[Array, "B T P"], patches: Float[Array, "B T P"], *, normalize: bool = True
) -> Float[Array, "B T P"]:
    """The pixels that a prediction stands for: the inverse of `targets`.

    With `normalize` by the mean and deviation of the image's own patches, which the model
    was not told: for a person to look at, and no measure of it.
    """
    if not normalize:
        return prediction.astype(jnp.float32)
    mean, deviation = _moments(patches.astype(jnp.float32))
    return prediction * deviation + mean


def _moments(x: Float[Array, "B T P"]) -> tuple[Float[Array, "B T 1"], Float[Array, "B T 1"]]:
    if x.shape[-1] < 2:
        raise ValueError("patches of one number have no variance; use normalize=False")
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, ddof=1, keepdims=True)
    return mean, jnp.sqrt(variance + EPSILON)


def squared_error(
    prediction: Float[Array, "B T P"],
    target: Float[Array, "B T P"],
    mask: Float[Array, "B T"],
    *,
    weight: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over masked patches of the mean squared error of their pixels, and their number.

    The loss is the one divided by the other. In float32.

    Args:
      prediction: what the model says of every patch.
      target: see `targets`.
      mask: 1 for a patch that the model was not shown, 0 for one that it was.
      weight: what each image counts; 0 for padding.
    """
    counted = mask.astype(jnp.float32)
    if weight is not None:
        counted *= weight.astype(jnp.float32)[:, None]
    error = ((prediction.astype(jnp.float32) - target) ** 2).mean(-1)
    # Padding may hold anything, NaN too.
    return jnp.where(counted > 0, error * counted, 0).sum(), counted.sum()


@dataclasses.dataclass(frozen=True)
class Reconstruct:
    """Reconstruction of the masked patches of `batch["image"]`.

    Patches are squares of `patch` pixels, as the model's. Which are masked is data:
    `batch["noise"]` `[B, T]` where there is such, or drawn from the key, uniform in 0 to
    1; a model masks those with the greatest noise, so many as its own ratio says.
    """

    patch: int
    normalize: bool = True  # pixels by their patch, see `targets`.
    inputs: tuple[str, ...] = ("image",)

    def check(self, model: Any, pipeline: Any) -> None:
        """Raises InputError where the model's patches are not this objective's."""
        if model.patch != self.patch:
            raise InputError(
                f"objective.patch={self.patch} is not model.patch={model.patch}; "
                f"set objective.patch={model.patch}"
            )

    def loss(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean squared error over the masked patches of the batch.

        Args:
          apply: `model.apply`: `({"params": params}, image, noise, train=..., rngs=...)`
            -> prediction `[B, T, P]`, P = patch * patch * C in the order of `patchify`,
            and mask `[B, T]`, 1 for what was masked. The model is initialised with
            `inputs` alone, for which it must need no noise.
          params: the model's parameters.
          batch: `image` `[B, Y, X, C]`, optionally `noise` `[B, T]`, `weight` `[B]`.
          key: for the noise, dropout and the like.
        """
        noise_key, key = jax.random.split(key)
        options = {"train": True, "rngs": {"dropout": key}}
        total, count = self._sums(apply, params, batch, noise_key, **options)
        return total / jnp.maximum(count, 1), {}

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> Metrics:
        """The sum of squared errors and the number of masked patches; noise as in `loss`."""
        total, count = self._sums(apply, params, batch, jax.random.split(key)[0])
        return {"loss": Mean(total, count.astype(jnp.int32))}

    def _sums(self, apply, params, batch, key, **options):
        images, *more = (batch[name] for name in self.inputs if name != "noise")
        patches = patchify(images, self.patch)
        noise = batch.get("noise")
        noise = jax.random.uniform(key, patches.shape[:2]) if noise is None else noise
        prediction, mask = apply({"params": params}, images, *more, noise, **options)
        target = targets(patches, normalize=self.normalize)
        return squared_error(prediction, target, mask, weight=batch.get("weight"))
