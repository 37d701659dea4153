"""The next token: cross-entropy of a language model, without all of its logits at once."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer import metrics
from jaxformer.errors import InputError


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Every token of `batch["tokens"]` from those before it in its text.

    A batch may also hold `segments` `[B, T]`, which text a token is of, 0 for padding;
    `answer` `[B, T]`, 1 for the tokens that are learned, such as an assistant's answers;
    `bytes` `[B, T]`, how many bytes a token stands for; and `weight` `[B]`.

    The logits of `chunk` tokens a row are made at a time, and made again for the gradient:
    `[B, chunk, V]` is the largest array there is. None makes all at once and keeps them,
    which is faster where they fit.

    `z_loss` is the factor of the mean squared logsumexp, which keeps logits near 0 (PaLM,
    arXiv 2204.02311: 1e-4). What layers sow into the collection "losses", those of mixtures
    of experts, is added as it is and reported by its name.

    With `prefix` all of a segment that is no answer sees itself both ways (PaliGemma, arXiv
    2407.07726): for a question and its answer in each, and a model that takes `prefix`.
    """

    z_loss: float = 0.0
    chunk: int | None = 128
    inputs: tuple[str, ...] = ("tokens",)
    prefix: bool = False

    def __post_init__(self):
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"chunk={self.chunk} must be 1 token or more, or None for all")

    def check(self, model: Any, pipeline: Any) -> None:
        """Raises InputError where a model sees what it is to guess, or has no row for an id."""
        if not getattr(model, "causal", True):
            raise InputError(
                "a model with causal=False sees the next token; set model.causal=True, or "
                "learn by Unmask(block=1, shift=True)"
            )
        vocab = getattr(pipeline.source, "vocab", None)
        if vocab is not None and vocab > model.vocab:
            kind = type(getattr(pipeline.source, "tokenizer", pipeline.source)).__name__
            raise InputError(
                f"{kind} has ids up to {vocab - 1}, but model.vocab={model.vocab}; set "
                f"model.vocab={vocab}, or take the tokenizer that the model was made for"
            )

    def loss(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean nats a token over all targets, with what is added to it; accuracy beside.

        Args:
          apply: `model.apply` of a model with methods `hidden` (tokens `[B, T]` -> `[B, T,
            D]`) and `logits` (`[B, t, D]` -> `[B, t, V]`).
          params: the model's parameters.
          batch: see the class.
          key: for dropout and the like.
        """
        options = {"train": True, "rngs": {"dropout": key}, "mutable": ["losses"]}
        x, left = self._hidden(apply, params, batch, options)
        targets, weight = following(batch)
        nats, lse, right = scores(apply, params, x, targets, self.chunk)
        total = jnp.maximum(weight.sum(), 1e-9)
        mean = (nats * weight).sum() / total
        found = {"nats": mean, "accuracy": (right * weight).sum() / total}
        loss = mean
        if self.z_loss:
            found["z_loss"] = self.z_loss * (lse**2 * weight).sum() / total
            loss += found["z_loss"]
        for name, value in sown(left.get("losses", {})).items():
            found[name] = value
            loss += value
        return loss, found

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> metrics.Metrics:
        """Nats a token, perplexity and accuracy of one batch; draws nothing.

        With `bytes` in the batch also `bits_per_byte`, over the bytes of what was asked
        for: the first token of a text is not, and what stands for no byte, such as the end
        of a text, costs bits all the same.
        """
        x, _ = self._hidden(apply, params, batch, {"mutable": ["losses"]})
        targets, weight = following(batch)
        nats, _, right = scores(apply, params, x, targets, self.chunk)
        return count(nats, right, weight > 0, batch.get("bytes"))

    def _hidden(self, apply, params, batch, options) -> tuple[Array, Any]:
        given = (batch[name] for name in self.inputs)
        if "segments" in batch:
            options |= {"segments": batch["segments"]}
        if self.prefix:
            options |= {"prefix": batch["answer"] == 0}
        return apply({"params": params}, *given, method="hidden", **options)


def following(batch: dict[str, Array]) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """The token after each, and its weight: 0 where a text ends. See `NextToken`."""
    tokens = batch["tokens"]

    def after(x: Array) -> Array:
        return jnp.roll(x, -1, axis=1)

    T = tokens.shape[1]
    real = jnp.broadcast_to(jnp.arange(T)[None] < T - 1, tokens.shape)
    if "segments" in batch:
        segments = batch["segments"]
        real &= (after(segments) == segments) & (segments != 0)
    weight = real.astype(jnp.float32)
    if "answer" in batch:
        weight *= after(batch["answer"]).astype(jnp.float32)
    if "weight" in batch:
        weight *= batch["weight"].astype(jnp.float32)[:, None]
    return after(tokens), weight


def scores(
    apply: Callable[..., Any],
    params: Any,
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    chunk: int | None,
    *,
    without: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Bool[Array, "B T"]]:
    """What the logits of `x` say of `targets`: nats, logsumexp, and whether it is first.

    A tie is not first. Logits are made `chunk` tokens a row at a time, see `NextToken`.
    The token `without` has no probability.
    """

    def part(x, targets):
        logits = apply({"params": params}, x, method="logits").astype(jnp.float32)
        ids = jnp.arange(logits.shape[-1])[None, None]
        if without is not None:
            logits = jnp.where(ids == without, -jnp.inf, logits)
        lse = jax.nn.logsumexp(logits, axis=-1)
        # As a sum and no look-up, so that a vocabulary may lie on several devices.
        own = jnp.where(ids == targets[..., None], logits, 0).sum(-1)
        right = (logits >= own[..., None]).sum(-1) == 1
        return lse - own, lse, right

    T = x.shape[1]
    if chunk is None:
        return part(x, targets)
    count = -(-T // chunk)

    def split(a):
        spare = [(0, 0), (0, count * chunk - T), *[(0, 0)] * (a.ndim - 2)]
        a = jnp.pad(a, spare)
        return a.reshape(len(a), count, chunk, *a.shape[2:]).swapaxes(0, 1)

    part = jax.checkpoint(part, prevent_cse=False)
    parts = (split(x), split(targets))
    _, made = jax.lax.scan(lambda carry, some: (carry, part(*some)), None, parts)
    nats, lse, right = (a.swapaxes(0, 1).reshape(len(x), -1)[:, :T] for a in made)
    return nats, lse, right


def count(
    nats: Float[Array, "B T"],
    right: Bool[Array, "B T"],
    real: Bool[Array, "B T"],
    lengths: Int[Array, "B T"] | None = None,
) -> metrics.Metrics:
    """Metrics that add up, of what `scores` says of targets.

    Args:
      nats: of each target.
      right: whether it is the model's first choice.
      real: which of them count.
      lengths: the bytes that each *token* stands for; a target is the token after.
    """
    tokens = real.sum(dtype=jnp.int32)
    total = jnp.where(real, nats, 0).sum()
    found = {
        "loss": metrics.Mean(total, tokens),
        "perplexity": metrics.Perplexity(total, tokens),
        "accuracy": metrics.Mean((right & real).sum(dtype=jnp.int32), tokens),
    }
    if lengths is not None:
        size = jnp.where(real, jnp.roll(lengths, -1, axis=1), 0).sum(dtype=jnp.int32)
        found["bits_per_byte"] = metrics.Mean(total / math.log(2), size)
    return found


def sown(tree: Any) -> dict[str, Array]:
    """What layers left in a collection: sums over all layers, by the names they gave."""
    found: dict[str, Array] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        name = str(keys[-1])
        found[name] = found.get(name, jnp.zeros(())) + value.sum()
    return found
