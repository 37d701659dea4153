"""Classification: softmax cross-entropy, and what evaluation counts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer import metrics
from jaxformer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Classify:
    """Softmax classification of `batch["image"]` into `batch["label"]`.

    `smoothing` spreads so much of each target over all classes (Szegedy et al. 2016). A
    batch with soft targets, `batch["target"]` `[B, V]`, is taken by those instead.
    """

    smoothing: float = 0.0
    inputs: tuple[str, ...] = ("image",)

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
        loss = (metrics.cross_entropy(logits, targets) * weight).sum() / total
        right = (logits.argmax(-1) == targets.argmax(-1)) * weight
        return loss, {"accuracy": right.sum() / total}

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> metrics.Metrics:
        """Sums and counts of one batch, see `metrics.classification`; draws nothing."""
        logits = apply({"params": params}, *(batch[name] for name in self.inputs))
        return metrics.classification(logits, batch["label"], batch.get("weight"))
