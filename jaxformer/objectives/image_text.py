"""Images and texts in three ways at once: contrast, matching, and writing the text.

Source: Li et al. 2023 (BLIP-2, arXiv 2301.12597), the first stage of the Q-Former; hard
negatives as in Li et al. 2021 (ALBEF, 2107.07651).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.errors import InputError
from jaxformer.metrics import Mean, Metrics
from jaxformer.ops.draw import draw


def cosines(image: Float[Array, "b Q E"], text: Float[Array, "B E"]) -> Float[Array, "b B"]:
    """How near each image is to each text, by that of its queries that is nearest.

    Vectors are of length 1: they are taken as they are.
    """
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("bqe,Be->bBq", image, text, precision=highest).max(-1)


def contrast(
    logits: Float[Array, "B B"], real: Bool[Array, " B"], smoothing: float = 0.0
) -> Float[Array, " B"]:
    """Nats of each row: which text is an image's, and which image is a text's, by halves.

    Args:
      logits: of image i (row) and text j; pairs are on the diagonal.
      real: rows that are none of padding; the others are nobody's negatives, and cost 0.
      smoothing: the share of each target that is spread evenly over all that are real.
    """
    both = real[:, None] & real[None]
    own = jnp.where(real, jnp.diagonal(logits), 0)

    def one(axis: int) -> Array:
        lse = jax.nn.logsumexp(jnp.where(both, logits, -jnp.inf), axis)
        lse = jnp.where(real, lse, 0)
        spread = jnp.where(both, logits, 0).sum(axis) / jnp.maximum(real.sum(), 1)
        return lse - (1 - smoothing) * own - smoothing * spread

    return jnp.where(real, (one(0) + one(1)) / 2, 0)


def negatives(
    logits: Float[Array, "B B"], other: Bool[Array, "B B"], key: Array | None = None
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """A text that is not its own for each image, and an image for each text.

    The likelier, the nearer they are: by `softmax(logits)` of what is left, or without a
    `key` the nearest. Where nothing is left the index has no meaning.

    Args:
      logits: of image i (row) and text j.
      other: whether they do not belong together, and both are real.
      key: for the draws.
    """
    left = jnp.where(other, jax.lax.stop_gradient(logits), -jnp.inf)
    if key is None:
        return left.argmax(1).astype(jnp.int32), left.argmax(0).astype(jnp.int32)
    texts, images = jax.random.split(key)
    return draw(texts, left), draw(images, left.T)


@dataclasses.dataclass(frozen=True)
class ImageText:
    """`batch["image"]` and `batch["tokens"]`, which start with a token that stands for all.

    The loss is the sum of three, times their `factors`: contrast of all pairs of the batch;
    matching, whether an image and a text belong together, of each pair and two hard
    negatives; and each token of the text by those before it and the image. `padding` is the
    token that is none. Two rows of the same text are no negatives to match; to contrast
    they are, as in CLIP. `smoothing` is that of contrast and of writing.

    The model has the methods `encode` and `matches` of `models.qformer.FirstStage`.
    """

    factors: tuple[float, ...] = (1.0, 1.0, 1.0)
    smoothing: float = 0.1
    padding: int = 0
    inputs: tuple[str, ...] = ("image", "tokens")

    def __post_init__(self):
        if not 0 <= self.smoothing < 1:
            raise InputError(f"smoothing={self.smoothing} must be at least 0 and below 1")
        if len(self.factors) != 3 or min(self.factors) < 0:
            raise InputError(
                f"factors={self.factors} must be three numbers, none below 0: of contrast, "
                "matching and writing"
            )

    def loss(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The sum, and each of the three beside it: nats a row, a pair and a token."""
        choose, *drops = jax.random.split(key, 3)
        options = [{"train": True, "rngs": {"dropout": drop}} for drop in drops]
        found = self._parts(apply, params, batch, choose, options, self.smoothing)
        parts = {}
        for name, (each, count, _) in found.items():
            parts[name] = each.sum() / jnp.maximum(count, 1)
        total = sum(f * part for f, part in zip(self.factors, parts.values(), strict=True))
        return jnp.asarray(total), parts

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> Metrics:
        """Each loss without smoothing and how often it is right; draws nothing.

        Negatives to match are the nearest of the batch: of another size both are other
        questions. `contrast_accuracy` is of texts for images.
        """
        found = self._parts(apply, params, batch, None, [{}, {}], 0.0)
        measured: Metrics = {}
        for name, (each, count, right) in found.items():
            measured[name] = Mean(each.sum(), count)
            measured[f"{name}_accuracy"] = Mean(right.sum(dtype=jnp.int32), count)
        return measured

    def _parts(self, apply, params, batch, key, options, smoothing):
        """Of each loss: nats of each row, how many count, and which are right."""
        tokens = batch["tokens"]
        weight = batch.get("weight")
        real = jnp.ones(len(tokens), bool) if weight is None else weight > 0
        words, model = tokens != self.padding, {"params": params}
        given = (batch[name] for name in self.inputs)
        context, image, text, scale, written = apply(
            model, *given, words, method="encode", **options[0]
        )
        logits = scale * cosines(image, text)
        best = jnp.where(real[None], logits, -jnp.inf).argmax(1)
        found = {
            "contrast": (
                contrast(logits, real, smoothing),
                real.sum(dtype=jnp.int32),
                real & (best == jnp.arange(len(real))),
            )
        }

        other = real[:, None] & real[None] & (tokens[:, None] != tokens[None]).any(-1)
        texts, images = negatives(logits, other, key)
        left = other.any(1)  # `other` is symmetric.
        rows = jnp.arange(len(real))
        seen, read = (jnp.concatenate(x) for x in ((rows, rows, images), (rows, texts, rows)))
        answers = apply(
            model, context[seen], tokens[read], words[read], method="matches", **options[1]
        )
        yes = jnp.arange(len(seen)) < len(rows)
        asked = jnp.concatenate([real, left, left])
        found["matching"] = self._of(answers, yes.astype(jnp.int32), asked, 0.0)

        if written is None:
            nothing = jnp.zeros(1), jnp.zeros((), jnp.int32), jnp.zeros(1, bool)
            return found | {"writing": nothing}
        known = words[:, 1:] & real[:, None]
        found["writing"] = self._of(written[:, :-1], tokens[:, 1:], known, smoothing)
        return found

    @staticmethod
    def _of(logits, targets, known, smoothing):
        logs = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]
        nats = -(1 - smoothing) * own - smoothing * logs.mean(-1)
        right = known & (logits.argmax(-1) == targets)
        return jnp.where(known, nats, 0), known.sum(dtype=jnp.int32), right
