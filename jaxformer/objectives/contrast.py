"""Contrast: an image and its text against all other pairs of the batch.

Both losses see the whole global batch, and no device ever holds all its pairs: see
`jaxformer.ops.pairs`. Two rows that show the same thing (equal `label`s, equal texts) are
negatives of one another, as in both originals.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.metrics import Mean, Metrics
from jaxformer.ops import pairs

Scalar = Float[Array, ""] | float


def softmax(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: Scalar,
    *,
    weight: Float[Array, " B"] | None = None,
    chunk: int = pairs.CHUNK,
) -> Float[Array, ""]:
    """CLIP's loss in nats: which text is an image's, and which image is a text's.

    The mean of both directions' cross-entropies over the batch. Radford et al. 2021
    (arXiv:2103.00020). Differentiable in reverse mode; float32 whatever is given.

    Args:
      image: embeddings of length 1: they are taken as they are.
      text: those of the texts; row i belongs to image i.
      scale: what cosines are multiplied with: exp of CLIP's learned `logit_scale`.
      weight: 0 for rows of padding, which neither count nor are negatives of others; all
        above 0 count alike.
      chunk: texts that a device looks at at once; memory grows with it, results do not
        change.

    Example:
      >>> one = jnp.eye(4)
      >>> float(softmax(one, one, scale=100.0)) < 1e-6
      True
    """
    image, text, real = _ready(image, text, weight)
    q = scale * image
    row, column = pairs.logsumexps(q, text, real, chunk=chunk)
    each = (row + column) / 2 - (q * text).sum(-1)
    return _mean(each, real)


def sigmoid(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: Scalar,
    bias: Scalar,
    *,
    weight: Float[Array, " B"] | None = None,
    chunk: int = pairs.CHUNK,
) -> Float[Array, ""]:
    """SigLIP's loss in nats: of every pair, whether it belongs together.

    The sum over all B * B pairs, divided by B. Zhai et al. 2023 (arXiv:2303.15343).
    Differentiable in reverse mode; float32 whatever is given.

    Args:
      image: embeddings of length 1: they are taken as they are.
      text: those of the texts; row i belongs to image i.
      scale: what cosines are multiplied with: exp of SigLIP's learned `t'`.
      bias: what is added to them then.
      weight: 0 for rows of padding, which neither count nor are negatives of others; all
        above 0 count alike.
      chunk: texts that a device looks at at once; memory grows with it, results do not
        change.
    """
    image, text, real = _ready(image, text, weight)
    q = scale * image
    bias = jnp.asarray(bias, jnp.float32)
    others = pairs.softplus_sums(q, text, jnp.full(real.shape, bias), real, chunk=chunk)
    own = jax.nn.softplus(-(q * text).sum(-1) - bias)
    return _mean(own + others, real)


def retrieval(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    *,
    weight: Float[Array, " B"] | None = None,
    chunk: int = pairs.CHUNK,
) -> Metrics:
    """How often the nearest text of the batch is the image's own, and the other way round.

    `image_to_text` and `text_to_image` are top-1 counts within this batch: of another
    size they are another question. Ties count against us.
    """
    image, text, real = _ready(image, text, weight)
    names = ("image_to_text", "text_to_image")
    count = real.sum(dtype=jnp.int32)
    found = pairs.ranks(image, text, real, chunk=chunk)
    hits = ((real * (rank < 1)).sum(dtype=jnp.int32) for rank in found)
    return {name: Mean(hit, count) for name, hit in zip(names, hits, strict=True)}


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Contrast of `batch["image"]` with `batch["tokens"]`, its text.

    `link` is CLIP's `softmax` or SigLIP's `sigmoid`. With `accumulate` above 1 the
    negatives of a row are those of its part of the batch.
    """

    link: Literal["softmax", "sigmoid"] = "softmax"
    inputs: tuple[str, ...] = ("image", "tokens")
    chunk: int = pairs.CHUNK  # texts at once, see `softmax`.

    def loss(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss in nats, and the scale and bias beside it.

        Args:
          apply: `model.apply`: `({"params": params}, image, tokens, train=..., rngs=...,
            method="encode")` -> embeddings of images and of texts, `[B, E]` of length 1;
            the scale, exp taken; the bias, 0 where the model has none.
          params: the model's parameters.
          batch: `image`, `tokens`, optionally `weight` `[B]`.
          key: for dropout and the like.
        """
        image, text, scale, bias = self._encode(
            apply, params, batch, train=True, rngs={"dropout": key}
        )
        scalars = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
        return self._of(image, text, scale, bias, batch.get("weight")), scalars

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> Metrics:
        """The loss and `retrieval` within the batch, as sums and counts; draws nothing."""
        image, text, scale, bias = self._encode(apply, params, batch)
        weight = batch.get("weight")
        found = retrieval(image, text, weight=weight, chunk=self.chunk)
        count = found["image_to_text"].count
        loss = self._of(image, text, scale, bias, weight)
        return {"loss": Mean(loss * count, count)} | found

    def _encode(self, apply, params, batch, **options):
        inputs = (batch[name] for name in self.inputs)
        return apply({"params": params}, *inputs, method="encode", **options)

    def _of(self, image, text, scale, bias, weight):
        options = {"weight": weight, "chunk": self.chunk}
        if self.link == "softmax":
            return softmax(image, text, scale, **options)
        return sigmoid(image, text, scale, bias, **options)


def _ready(
    image: Array, text: Array, weight: Array | None
) -> tuple[Array, Array, Int[Array, " B"]]:
    """Embeddings in float32, those of padding 0, and which rows are real."""
    real = jnp.ones(image.shape[0], bool) if weight is None else weight > 0
    image, text = (jnp.where(real[:, None], x.astype(jnp.float32), 0) for x in (image, text))
    return image, text, real.astype(jnp.int32)


def _mean(each: Array, real: Array) -> Array:
    return jnp.where(real > 0, each, 0).sum() / jnp.maximum(real.sum(), 1)
