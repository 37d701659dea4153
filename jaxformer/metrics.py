"""Metrics as sums that add over batches, devices and hosts, divided once at the end.

A metric is a frozen pytree. Add two with `merge`, read one with `.value()`. Counts are
integers, so that they are equal on any number of devices.
"""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, PyTree


class Mean(struct.PyTreeNode):
    """A mean: the weighted sum of what was seen, and how many were seen."""

    sum: Any  # An array: of JAX inside of a step, of NumPy on the host.
    count: Any

    def value(self) -> float:
        """The mean; nan where nothing was seen."""
        return float(self.sum) / float(self.count) if self.count else float("nan")


class Perplexity(struct.PyTreeNode):
    """The exponential of a mean: of how many tokens, alike likely, a model has to choose.

    `sum` is of nats, `count` of tokens.
    """

    sum: Any
    count: Any

    def value(self) -> float:
        """nan where nothing was seen."""
        return math.exp(Mean(self.sum, self.count).value()) if self.count else float("nan")


class Error(struct.PyTreeNode):
    """The standard error of a `Mean` that was drawn: `sum` is of the variances of its parts."""

    sum: Any
    count: Any

    def value(self) -> float:
        """nan where nothing was seen."""
        return math.sqrt(float(self.sum)) / float(self.count) if self.count else float("nan")


class Calibration(struct.PyTreeNode):
    """Expected calibration error over equal bins of confidence (Guo et al. 2017).

    `sum` `[bins]` holds confidence minus correctness, `count` `[bins]` the examples.
    """

    sum: Any
    count: Any

    def value(self) -> float:
        """The error, 0 to 1: bins weigh as many examples as they hold."""
        seen = float(np.sum(self.count))
        return float(np.sum(np.abs(self.sum))) / seen if seen else float("nan")


class Confusion(struct.PyTreeNode):
    """How often each class (row) was called each class (column): `sum` `[V, V]`."""

    sum: Any
    count: Any

    def value(self) -> list[list[int]]:
        """The table itself, as rows of integers."""
        return np.asarray(self.sum).astype(int).tolist()


class Use(struct.PyTreeNode):
    """How many entries of a table are used, as if all were used alike: exp of the entropy.

    `sum` `[V]` is how often each was, `count` how often any was.
    """

    sum: Any
    count: Any

    def value(self) -> float:
        """Between 1 and V; nan where nothing was seen."""
        seen = float(np.sum(self.sum))
        share = np.asarray(self.sum)[np.asarray(self.sum) > 0] / max(seen, 1.0)
        return float(np.exp(-np.sum(share * np.log(share)))) if seen else float("nan")


class Whole(struct.PyTreeNode):
    """A number of a whole set, which no parts add up to: `sum` is it, `count` of how many."""

    sum: Any
    count: Any

    def value(self) -> float:
        """The number."""
        return float(self.sum)


class Note(struct.PyTreeNode):
    """How a group of metrics was taken: names and values, of `count` examples."""

    about: Any = struct.field(pytree_node=False)
    count: Any
    sum: Any = 0

    def value(self) -> dict[str, Any]:
        """The names and values."""
        return dict(self.about)


Metrics = dict[str, Whole | Note | Mean | Perplexity | Error | Calibration | Confusion | Use]


def merge(a: PyTree, b: PyTree) -> PyTree:
    """Adds two trees of metrics; on the host in 64 bits, so that long sums stay exact."""
    return jax.tree.map(operator.add, a, b)


def to_host(metrics: PyTree) -> PyTree:
    """The same metrics as NumPy arrays of 64 bits."""

    def wide(x):
        x = np.asarray(x)
        return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)

    return jax.tree.map(wide, metrics)


def cross_entropy(
    logits: Float[Array, "*B V"], targets: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """Cross-entropy in nats of each row against target probabilities, in float32."""
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1)


def top(
    scores: Float[Array, "B V"],
    labels: Int[Array, " B"],
    weight: Float[Array, " B"] | None = None,
) -> Metrics:
    """How often the true class has the greatest score (`top1`), or one of the first five.

    Ties and NaN count against us, so that no output is right by luck.
    """
    V = scores.shape[-1]
    truth = jnp.take_along_axis(scores, labels[:, None], axis=-1)
    others = (~(scores < truth)).at[jnp.arange(len(labels)), labels].set(False)
    rank = others.sum(-1)
    return {f"top{k}": within(rank, min(k, V), weight) for k in (1, 5)}


def within(rank: Int[Array, " B"], k: int, weight: Float[Array, " B"] | None = None) -> Mean:
    """How many ranks, counted from 0, are below `k`; padding weighs 0."""
    real = jnp.ones(rank.shape, bool) if weight is None else weight > 0
    return Mean((real & (rank < k)).sum(dtype=jnp.int32), real.sum(dtype=jnp.int32))


def classification(
    logits: Float[Array, "B V"],
    labels: Int[Array, " B"],
    weight: Float[Array, " B"] | None = None,
    *,
    bins: int = 15,
) -> Metrics:
    """Loss (nats), top-1, top-5, calibration error and confusion of one batch.

    Args:
      logits: one row an example.
      labels: the true class of each.
      weight: 1 for an example, 0 for padding; all 1 if not given.
      bins: how many bins of confidence the calibration error has.
    """
    V = logits.shape[-1]
    weight = jnp.ones(labels.shape) if weight is None else weight
    real = weight > 0
    probability = jax.nn.softmax(logits.astype(jnp.float32))
    nll = cross_entropy(logits, jax.nn.one_hot(labels, V))
    guess, confidence = logits.argmax(-1), probability.max(-1)
    bin_of = jnp.minimum((confidence * bins).astype(jnp.int32), bins - 1)
    gap = jnp.where(real, confidence - (guess == labels), 0)
    count = real.sum(dtype=jnp.int32)
    ones = real.astype(jnp.int32)

    def mean(x: Array) -> Mean:
        return Mean(jnp.where(real, x, 0).sum(), count)

    return {
        "loss": mean(nll),
        **top(logits, labels, weight),
        "calibration": Calibration(
            jnp.zeros(bins).at[bin_of].add(gap),
            jnp.zeros(bins, jnp.int32).at[bin_of].add(ones),
        ),
        "confusion": Confusion(jnp.zeros((V, V), jnp.int32).at[labels, guess].add(ones), count),
    }
