"""Latents of images, encoded once: what a diffusion model trains on at full speed.

`write_latents` keeps of each image the law of its latents, mean beside log-variance, as an
ArrayRecord file that `shards.ArrayRecord` reads; `Draw` makes a fresh draw of it whenever it
is read, as an encoder at every step would:

    Pipeline(ArrayRecord("latents-*.array_record", 1000), (Draw(0.18215),))
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.data.images import Number
from jaxformer.data.loader import Pipeline, eval_batches
from jaxformer.data.shards import write_array_record
from jaxformer.data.sources import Record
from jaxformer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Draw:
    """A draw of the law that a record holds, less `shift`, times `scale`.

    `scale` and `shift` are the autoencoder's, a number or one for each channel.
    """

    scale: Number | tuple[Number, ...]
    shift: Number | tuple[Number, ...] = 0.0

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        mean, log_variance = _law(record)
        noise = rng.standard_normal(mean.shape, np.float32)
        return record | {"image": self.scaled(mean + np.exp(log_variance / 2) * noise)}

    def scaled(self, latents: np.ndarray) -> np.ndarray:
        """As a diffusion model takes them."""
        scale, shift = np.asarray(self.scale, np.float32), np.asarray(self.shift, np.float32)
        return (latents - shift) * scale


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of the law that a record holds, scaled as `Draw` does; nothing is drawn."""

    scale: Number | tuple[Number, ...]
    shift: Number | tuple[Number, ...] = 0.0

    def __call__(self, record: Record) -> Record:
        return record | {"image": Draw(self.scale, self.shift).scaled(_law(record)[0])}


def _law(record: Record) -> list[np.ndarray]:
    image = record["image"]
    if isinstance(image, bytes) or image.dtype != np.float32 or image.shape[-1] % 2:
        raise InputError(
            f"{record.get('source', 'image')}: holds no law of latents; write the file with "
            "write_latents"
        )
    return np.split(image, 2, axis=-1)


def write_latents(
    path: str, pipeline: Pipeline, model: nn.Module, params: Any, *, batch_size: int = 64
) -> int:
    """Encodes every image of a pipeline once, and writes the laws; returns how many.

    Args:
      path: the file; of several hosts, each one writes its own of its part of the source.
      pipeline: images as the autoencoder takes them, -1 to 1; nothing random in it. To have
        them mirrored too, write a second file of a pipeline that mirrors all.
      model: an autoencoder with `posterior`, such as `models.vae.KLAutoencoder`.
      params: its parameters.
      batch_size: of images encoded at a time.

    Raises:
      InputError: a pipeline that draws, or images that the autoencoder cannot take.
    """
    count = [0]

    @jax.jit
    def encode(images):
        law: Any = model.apply({"params": params}, images, method="posterior")
        return jnp.concatenate([law.mean, law.log_variance], -1)

    def records() -> Iterator[Record]:
        left = len(pipeline.source)
        for batch in eval_batches(pipeline, batch_size=batch_size):
            try:
                laws = np.asarray(encode(batch["image"]), np.float32)
            except ValueError as error:
                raise InputError(f"{os.fspath(path)}: {error}") from error
            for law, label in zip(laws[:left], batch["label"][:left], strict=True):
                count[0] += 1
                yield {"image": law, "label": int(label)}
            left = max(left - len(laws), 0)

    write_array_record(path, records())
    return count[0]
