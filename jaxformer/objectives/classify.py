"""Classification: softmax or sigmoid cross-entropy, and what evaluation counts."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxformer import metrics
from jaxformer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Classify:
    """Classification of `batch["image"]` into `batch["label"]`.

    `smoothing` spreads so much of each target over all classes (Szegedy et al. 2016). A
    batch with soft targets, `batch["target"]` `[B, V]` (those of `Mixup`, say), is taken by
    those instead.

    With `link="sigmoid"` each class is a yes or no of its own, and the loss is the sum of
    their cross-entropies (Beyer et al. 2020, arXiv:2006.07159; big_vision's
    `sigmoid_xent`): start the head's bias low, at -log(V) or so.
    """

    smoothing: float = 0.0
    inputs: tuple[str, ...] = ("image",)
    link: Literal["softmax", "sigmoid"] = "softmax"

    def __post_init__(self):
        if not 0 <= self.smoothing < 1:
            raise InputError(f"smoothing={self.smoothing} must lie in [0, 1); 0.1 is usual")

    def check(self, model: Any, pipeline: Any) -> None:
        """Raises InputError where the data has more classes than the model."""
        classes = pipeline.source.num_classes
        if classes > model.num_classes:
            raise InputError(
                f"{type(pipeline.source).__name__} has {classes} classes, but "
                f"model.num_classes={model.num_classes}; set model.num_classes={classes}"
            )

    def loss(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean cross-entropy in nats over the batch, and the accuracy beside it.

        Args:
          apply: `model.apply`: `({"params": params}, image, train=..., rngs=...)` ->
            logits `[B, V]`.
          params: the model's parameters.
          batch: `image`, `label` `[B]`, optionally `target` `[B, V]`, `weight` `[B]`.
          key: for dropout and the like.
        """
        images = (batch[name] for name in self.inputs)
        logits = apply({"params": params}, *images, train=True, rngs={"dropout": key})
        V = logits.shape[-1]
        targets = batch.get("target")
        targets = jax.nn.one_hot(batch["label"], V) if targets is None else targets
        targets = (1 - self.smoothing) * targets + self.smoothing / V
        weight = batch.get("weight", jnp.ones(logits.shape[0]))
        total = jnp.maximum(weight.sum(), 1)
        loss = (self._each(logits, targets) * weight).sum() / total
        right = (logits.argmax(-1) == targets.argmax(-1)) * weight
        return loss, {"accuracy": right.sum() / total}

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> metrics.Metrics:
        """Sums and counts of one batch, see `metrics.classification`; draws nothing.

        The loss is that of the link, on labels that are not smoothed; calibration is that
        of the softmax whatever the link.
        """
        logits = apply({"params": params}, *(batch[name] for name in self.inputs))
        labels, weight = batch["label"], batch.get("weight")
        found = metrics.classification(logits, labels, weight)
        if self.link == "sigmoid":
            each = self._each(logits, jax.nn.one_hot(labels, logits.shape[-1]))
            each = each if weight is None else jnp.where(weight > 0, each, 0)
            found["loss"] = metrics.Mean(each.sum(), found["top1"].count)
        return found

    def _each(self, logits, targets):
        """Nats of each row."""
        if self.link == "softmax":
            return metrics.cross_entropy(logits, targets)
        binary = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets)
        return binary.sum(-1)
