"""Masked diffusion: a bound of a text's likelihood, by guessing what is masked in it.

The bound is an integral over time of the nats of all masked tokens, by the schedule's rate.
Where little is masked the rate has no limit. Others leave the first thousandth out, and
report less than a bound. Here, below `floor`, what is masked at `floor` is shown in one
step, which is a step of the same bound: one draw estimates all of it without bias, and no
weight is above that of `floor`. Masking exactly k of n tokens, k evenly from 1 to n and weight
`n / k`, has the same mean as the integral without any floor (LLaDA, arXiv 2502.09992).

A guess has the form SUBS (MDLM, arXiv 2406.07524): what is seen stays, and the mask itself
is never guessed.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxformer import metrics
from jaxformer.errors import InputError
from jaxformer.objectives.next_token import scores, sown
from jaxformer.objectives.schedules import Clipped, Linear, Schedule
from jaxformer.objectives.times import times
from jaxformer.ops import intervals
from jaxformer.ops.draw import uniform
from jaxformer.ops.mask import BlockDiffusion, Causal, Mask, Segments, Twice

FLOOR = 1e-3
LINEAR = Linear()


class Noisy(struct.PyTreeNode):
    """Tokens of which some are masked; what the nats of each weigh, 0 where it is seen.

    The sum of `weight * nats` over a row estimates the row's bound, but for
    `unmasked_at_end * log V` a token. `share` is the mean probability of being masked.
    """

    tokens: Int[Array, "B T"]
    weight: Float[Array, "B T"]
    share: Float[Array, "B T"]


def _divides(block: int | None, T: int) -> int:
    """The tokens of a block of a row, which is one block if there is no other."""
    if block is not None and (block < 1 or T % block):
        raise InputError(f"block={block} must divide the row of {T} tokens")
    return T if block is None else block


def by_time(
    tokens: Int[Array, "B T"],
    key: Array,
    *,
    mask_id: int,
    schedule: Schedule = LINEAR,
    block: int | None = None,
    hidden: Bool[Array, "B T"] | None = None,
    at: Float[Array, "B n"] | None = None,
    floor: float = FLOOR,
) -> Noisy:
    """Masks each token with the probability of a time, drawn for a row, or for each block.

    Args:
      tokens: rows.
      key: of the draw.
      mask_id: the token that says "masked".
      schedule: see `objectives.schedules`.
      block: tokens a block, which divides T; a row is one block if not given.
      hidden: which tokens may be masked; all if not given.
      at: the times, of each block; drawn by `times` if not given.
      floor: the time below which all is shown in one step.
    """
    B, T = tokens.shape
    drawn, which = jax.random.split(key)
    size = _divides(block, T)
    at = times(drawn, B, T // size) if at is None else at
    t = jnp.repeat(at, size, axis=1)
    late = jnp.maximum(t, floor)
    share = schedule.masked(late)
    hides = uniform(which, (B, T)) < share
    hides = hides if hidden is None else hides & hidden
    clipped = isinstance(schedule, Clipped)
    rate = schedule.rate(late)
    rate = rate if clipped else jnp.where(t < floor, 1 / floor, rate)
    return Noisy(jnp.where(hides, mask_id, tokens), jnp.where(hides, rate, 0), share)


def by_count(
    tokens: Int[Array, "B T"],
    key: Array,
    *,
    mask_id: int,
    block: int | None = None,
    hidden: Bool[Array, "B T"] | None = None,
    at: Float[Array, "B n"] | None = None,
) -> Noisy:
    """Masks exactly k of the n tokens that may be, in each row or block; args as `by_time`."""
    B, T = tokens.shape
    drawn, which = jax.random.split(key)
    size = _divides(block, T)
    may = jnp.ones((B, T), bool) if hidden is None else hidden
    may = may.reshape(B, -1, size)
    n = may.sum(-1, keepdims=True)
    at = times(drawn, B, T // size) if at is None else at
    k = jnp.ceil(at[..., None] * n)
    order = jnp.where(may, jax.random.uniform(which, may.shape), 2)
    rank = jnp.argsort(jnp.argsort(order, -1), -1)
    hides = (may & (rank < k)).reshape(B, T)
    weight = jnp.broadcast_to(n / jnp.maximum(k, 1), may.shape).reshape(B, T)
    share = jnp.broadcast_to(k / jnp.maximum(n, 1), may.shape).reshape(B, T)
    return Noisy(jnp.where(hides, mask_id, tokens), jnp.where(hides, weight, 0), share)


def nats(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], mask_id: int
) -> Float[Array, "B T"]:
    """What a guess by `logits` costs; the mask is never guessed. Float32 at least."""
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    ids = jnp.arange(logits.shape[-1])[None, None]
    logits = jnp.where(ids == mask_id, -jnp.inf, logits.astype(dtype))
    own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - own


def loss(
    denoise: Callable[[Array, Array], Array],
    tokens: Int[Array, "B T"],
    key: Array,
    *,
    mask_id: int,
    schedule: Schedule = LINEAR,
    weight: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """An estimate of the bound, nats a token, of any function that guesses.

    Args:
      denoise: `(tokens [B, T], share masked [B]) -> logits [B, T, V]`, the share of a row.
      tokens: rows, none of them masked.
      key: of the draw.
      mask_id: the token that says "masked".
      schedule: see `objectives.schedules`.
      weight: 0 for padding and for what is given, which is never masked; else 1.
    """
    hidden = None if weight is None else weight > 0
    noisy = by_time(tokens, key, mask_id=mask_id, schedule=schedule, hidden=hidden)
    share = noisy.share[:, 0] if hidden is None else noisy.share[:, 0] * hidden.mean(1)
    logits = denoise(noisy.tokens, share)
    each = jnp.where(noisy.weight > 0, nats(logits, tokens, mask_id), 0)
    count = tokens.size if weight is None else jnp.maximum(weight.sum(), 1)
    end = schedule.unmasked_at_end * math.log(logits.shape[-1] - 1)
    hits = (noisy.weight > 0).astype(jnp.float32)
    found = {
        "masked_nats": each.sum() / jnp.maximum(hits.sum(), 1),
        "masked": hits.sum() / count,
    }
    return (each * noisy.weight).sum() / count + end, found


def exact(
    denoise: Callable[[Array, Array], Array], tokens: Int[Array, " T"], *, mask_id: int
) -> Float[Array, ""]:
    """The bound of one short text itself, nats, by every set of masked tokens.

    A set of `m` of `n` tokens weighs `(m - 1)! (n - m)! / n!`. For up to 16 tokens.
    """
    (n,) = tokens.shape
    if n > 16:
        raise InputError(f"exact takes 2 ** T sets, and T={n}; give 16 tokens or fewer")
    sets = np.array(list(itertools.product([False, True], repeat=n)))[1:]
    m = sets.sum(1)
    ways = [math.factorial(i - 1) * math.factorial(n - i) / math.factorial(n) for i in m]
    rows = jnp.broadcast_to(tokens[None], sets.shape)
    logits = denoise(jnp.where(sets, mask_id, rows), jnp.asarray(m / n))
    each = jnp.where(sets, nats(logits, rows, mask_id), 0)
    return (each.sum(1) * jnp.asarray(ways, each.dtype)).sum()


@dataclasses.dataclass(frozen=True)
class Unmask:
    """Learns to guess what is masked in `batch["tokens"]`; batches as of `NextToken`.

    What `answer` leaves out, a prompt, is seen always. With a `block` it is block diffusion
    (BD3-LM, arXiv 2503.09573): each block is guessed by itself and by the clean blocks
    before it; `block=1` is a model of the next token, and `block=T` masked diffusion. A block
    in which a text of a packed row ends and another begins is two: neither sees the other.

    With `shift` a token is guessed where the model stands at the one before it, as a decoder
    guesses (Dream, arXiv 2508.15487): in a block by the noisy one, and the first of a block
    by the clean one. The first token of a text is then given, as it is to a decoder, and
    `block=1` is the decoder itself: its loss, without a noisy half.

    Evaluation draws by count, `samples` times a batch, and is the bound itself; so does
    training where a block is one token, which is then always masked. By time the constant of
    a schedule that leaves some tokens seen at its end, `unmasked_at_end * log V`, is left out
    of the loss: it has no gradient. With `timed` the model
    is told how much is masked, as `share`, see `models.timed`: of a text, its prompt too.
    """

    mask_id: int
    schedule: Schedule = LINEAR
    draw: Literal["time", "count"] = "time"
    block: int | None = None
    chunk: int | None = 128
    samples: int = 1
    timed: bool = False
    shift: bool = False
    inputs: tuple[str, ...] = ("tokens",)

    def __post_init__(self):
        for name in ("samples", "chunk", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"objective.{name}={value} must be 1 or more")
        if self.draw not in ("time", "count"):
            raise InputError(f"objective.draw={self.draw!r} must be time or count")
        if isinstance(self.schedule, Clipped) and (self.draw == "count" or self.block == 1):
            raise InputError(
                "a Clipped schedule is of times; set objective.draw=time and a block above 1"
            )

    def arguments(self, tokens: Array) -> tuple[Array, ...]:
        """What the model is called with, of such a batch."""
        return (tokens, jnp.zeros(tokens.shape[0])) if self.timed else (tokens,)

    def check(self, model: Any, pipeline: Any) -> None:
        """Raises InputError where mask, data and model do not fit."""
        if not 0 <= self.mask_id < model.vocab:
            raise InputError(
                f"mask_id={self.mask_id} is no token of model.vocab={model.vocab}; the mask "
                "needs an id of its own, such as the last"
            )
        vocab = getattr(pipeline.source, "vocab", None)
        if (
            vocab is not None
            and vocab > self.mask_id
            and not special(getattr(pipeline.source, "tokens", None), self.mask_id)
        ):
            raise InputError(
                f"the data has ids up to {vocab - 1}, which leaves no id for the mask, "
                f"mask_id={self.mask_id}; set mask_id={vocab} and model.vocab={vocab + 1}, or "
                "give a tokenizer in which that id is a special token"
            )
        if model.causal:
            raise InputError("a model that unmasks sees both ways; set model.causal=False")
        windows = getattr(model, "windows", ())
        near = getattr(model, "positions", None) == "alibi" or any(windows)
        if near and self.block is not None and not self._clean:
            raise InputError(
                f"objective.block={self.block} reads a text twice in one row, where windows "
                "and ALiBi would count from one half to the other; give the model neither"
            )
        if self.timed != hasattr(model, "condition"):
            kind = type(model).__name__
            raise InputError(
                f"objective.timed={self.timed}, which is not for {kind}; a TimedDecoder has "
                "timed=True, and other models are told no time"
            )

    def prepare(self, batch: dict, key: Array, step: Int[Array, ""]) -> dict:
        """With `times` of its rows, one in each part of the whole batch; see `steps`."""
        B, T = batch["tokens"].shape
        return batch | {"times": times(key, B, T // (self.block or T))}

    def loss(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The bound, nats a token that may be masked; see `NextToken.loss` for the args.

        What layers sow into the collection "losses" is added, as it is by `NextToken`.
        """
        drawn, key = jax.random.split(key)
        hidden = self.hidden(batch)
        draw = "count" if self.block == 1 else self.draw
        noisy = self._noisy(batch["tokens"], drawn, hidden, draw, batch.get("times"))
        options = {"train": True, "rngs": {"dropout": key}, "mutable": ["losses"]}
        each, right, left = self._guess(apply, params, batch, noisy, options)
        hits = noisy.weight > 0
        total = jnp.maximum(hidden.sum(), 1)
        masked = jnp.maximum(hits.sum(), 1)
        found = {
            "masked_nats": jnp.where(hits, each, 0).sum() / masked,
            "accuracy": (hits & right).sum() / masked,
        }
        bound = jnp.where(hits, each * noisy.weight, 0).sum() / total
        added = sown(left.get("losses", {}))
        return bound + sum(added.values()), found | added

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> metrics.Metrics:
        """The bound: nats a token, perplexity, and `bits_per_byte` where there are `bytes`.

        Of 2 samples or more also the standard error of the draw, `loss_error` and
        `bits_per_byte_error`: by the variance of each row's draws, which counts nothing for
        strata, so that it is rather too large.
        """
        hidden = self.hidden(batch)
        drawn = []
        for i in range(self.samples):
            key_of = jax.random.fold_in(key, i)
            noisy = self._noisy(batch["tokens"], key_of, hidden, "count")
            options = {"mutable": ["losses"]}
            each, *_ = self._guess(apply, params, batch, noisy, options)
            drawn.append(jnp.where(noisy.weight > 0, each * noisy.weight, 0).sum(1))
        rows = jnp.stack(drawn)
        total = rows.mean(0).sum()
        count = hidden.sum(dtype=jnp.int32)
        found: metrics.Metrics = {
            "loss": metrics.Mean(total, count),
            "perplexity": metrics.Perplexity(total, count),
        }
        sizes = {"loss": (1.0, count)}
        if "bytes" in batch:
            size = jnp.where(hidden, batch["bytes"], 0).sum(dtype=jnp.int32)
            sizes["bits_per_byte"] = (math.log(2), size)
            found["bits_per_byte"] = metrics.Mean(total / math.log(2), size)
        if self.samples > 1:
            variance = rows.var(0, ddof=1).sum() / self.samples
            for name, (unit, size) in sizes.items():
                found[f"{name}_error"] = metrics.Error(variance / unit**2, size)
        return found

    def hidden(self, batch: dict) -> Bool[Array, "B T"]:
        """Which tokens of a batch may be masked: those that are learned, and can be guessed."""
        found = learned(batch)
        return found & follows(batch) if self.shift else found

    def costs(
        self, apply: Callable[..., Any], params: Any, batch: dict
    ) -> Callable[[Int[Array, "B T"], Int[Array, "B T"]], Float[Array, "B T"]]:
        """`(noisy, tokens) -> nats` of every token: what `variances` asks of a model.

        `tokens` are those of the batch, whose texts do not see each other.
        """

        def nats_of(noisy, tokens):
            hides = (noisy == self.mask_id).astype(jnp.float32)
            size = self.block or tokens.shape[1]
            given = batch | {"tokens": tokens}
            k, n = (x.reshape(len(x), -1, size).sum(-1) for x in (hides, self.hidden(given)))
            share = (k / jnp.maximum(n, 1)).repeat(size, 1)
            made = Noisy(noisy, hides, share)
            options = {"mutable": ["losses"]}
            return self._guess(apply, params, given, made, options)[0]

        return nats_of

    @property
    def _clean(self) -> bool:
        """True where all that is seen is clean: a decoder, which needs no noisy half."""
        return self.block == 1 and self.shift

    def _noisy(self, tokens, key, hidden, draw, at=None) -> Noisy:
        how: Any = {"mask_id": self.mask_id, "block": self.block, "hidden": hidden, "at": at}
        if draw == "count":
            return by_count(tokens, key, **how)
        return by_time(tokens, key, schedule=self.schedule, **how)

    def _guess(self, apply, params, batch, noisy: Noisy, options):
        tokens, given = batch["tokens"], dict(options)
        segments = {n: batch[n] for n in ("segments",) if n in batch}
        if self.block is None:
            rows, given = noisy.tokens, given | segments
            real = batch["segments"] != 0 if segments else jnp.ones_like(tokens, bool)
            may = self.hidden(batch).sum(1) / jnp.maximum(real.sum(1), 1)
            share = noisy.share[:, 0] * may
        elif self._clean:
            rows, given = tokens, given | segments | {"mask": Causal()}
            share = jnp.zeros(len(tokens))
        else:
            rows, more = two_streams(noisy.tokens, tokens, self.block, batch)
            given |= more
            share = jnp.concatenate([noisy.share, jnp.zeros_like(noisy.share)], 1)
        if self.timed:
            given["share"] = share
        x, left = apply({"params": params}, rows, method="hidden", **given)
        T = tokens.shape[1]
        if self.shift:
            before = jnp.roll(x[:, :T], 1, axis=1)  # No first token is asked for.
            if self.block is not None and x.shape[1] > T:
                first = jnp.arange(T)[None, :, None] % self.block == 0
                before = jnp.where(first, jnp.roll(x[:, T:], 1, axis=1), before)
            x = before
        each, _, right = scores(
            apply, params, x[:, :T], tokens, self.chunk, without=self.mask_id
        )
        return each, right, left


def special(tokens: Any, token: int) -> bool:
    """Whether a token is one that no text holds, by a tokenizer, or by data that have one."""
    lengths = getattr(tokens, "lengths", None)
    tokenizer = getattr(tokens, "tokenizer", tokens)
    around = (getattr(tokenizer, name, None) for name in ("begin", "end"))
    return lengths is not None and bool(lengths[token] == 0) and token not in around


def learned(batch: dict[str, Array]) -> Bool[Array, "B T"]:
    """Which tokens may be masked: no padding, and of conversations the answers."""
    tokens = batch["tokens"]
    found = jnp.ones(tokens.shape, bool)
    if "segments" in batch:
        found &= batch["segments"] != 0
    if "answer" in batch:
        found &= batch["answer"] != 0
    if "weight" in batch:
        found &= (batch["weight"] > 0)[:, None]
    return found


def follows(batch: dict[str, Array]) -> Bool[Array, "B T"]:
    """Which tokens stand after another one of their text."""
    tokens = batch["tokens"]
    segments = batch.get("segments", jnp.ones_like(tokens))
    same = segments[:, 1:] == segments[:, :-1]
    return jnp.pad(same, [(0, 0), (1, 0)])


def two_streams(
    noisy: Int[Array, "B T"],
    clean: Int[Array, "B T"],
    block: int,
    batch: dict[str, Array] | None = None,
) -> tuple[Int[Array, "B U"], dict[str, Any]]:
    """Rows `[noisy, clean]` of block diffusion, and what a language model is given with them.

    Both halves have the same positions. The first half of the result is that of `noisy`.
    """
    T = clean.shape[1]
    mask: Mask = BlockDiffusion(block)
    at = jnp.arange(T)[None]
    segments = None if batch is None else batch.get("segments")
    if segments is not None:
        mask = mask & Twice(Segments(segments))
        at = at - intervals.runs(segments)[0]
    positions = jnp.concatenate([at, at], 1)
    return jnp.concatenate([noisy, clean], 1), {"mask": mask, "positions": positions}
