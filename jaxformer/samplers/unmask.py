"""Drawing by masked diffusion: guesses for all that is masked, some of them shown a step.

`sample(denoise, tokens, key, mask_id=..., show=Count(16))` fills what is masked in `tokens`,
wherever it stands: after a prompt, before an ending, in the middle. One program, static
shapes; a row is drawn by its own key and does not depend on the others.

What is shown in a step is the choice of a `show`: `Chance` (ancestral, MDLM, arXiv
2406.07524), `FirstHitting` (the same without steps of time, 2409.02908), `Count` (LLaDA,
2502.09992; MaskGIT, 2202.04200; Dream, 2508.15487), `Above` (Fast-dLLM, 2505.22618) or
`Bound` (EB-Sampler, 2505.24857). `samplers.blocks` does the same with caches.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxformer.errors import InputError
from jaxformer.objectives.schedules import Linear, Schedule
from jaxformer.ops.draw import uniform
from jaxformer.samplers.autoregressive import by_row
from jaxformer.samplers.logits import PLAIN, Law

Denoise = Callable[[Int[Array, "B T"], Float[Array, " B"]], Float[Array, "B T V"]]
Rank = Literal["confidence", "margin", "entropy", "random"]
LINEAR = Linear()


class Step(struct.PyTreeNode):
    """What a choice is made by: one row at one step.

    `open` are the masked tokens of the block at work; `number` counts the block's steps from
    0. `logits` are the model's, `token` is what the law drew from them, and `chance` the
    model's own probability of that. Each token has a key of its own.
    """

    open: Bool[Array, " T"]
    number: Int[Array, ""]
    logits: Float[Array, "T V"]
    token: Int[Array, " T"]
    chance: Float[Array, " T"]
    keys: Array


@runtime_checkable
class Show(Protocol):
    """Which of the open tokens of a row are shown; at least one a step on the whole."""

    def pick(self, step: Step) -> Bool[Array, " T"]:
        """Marks them."""
        ...

    def share(
        self, number: Int[Array, ""], count: Int[Array, ""], last: Float[Array, ""], key: Array
    ) -> Float[Array, ""] | None:
        """What share of a block's masks the model is told are left; None has them counted.

        `number` and `count` are the block's steps and its masked tokens, `last` is the share
        of the step before, 1 at first.
        """
        return None


@dataclasses.dataclass(frozen=True)
class Count(Show):
    """As many as it takes to be done in `steps` a block, first those of the best rank.

    More steps than a block has masks end with one token a step, when all are shown.
    By "confidence", the probability of what was drawn; its "margin" over the second best;
    the least "entropy"; or at "random", which one token a step makes the exact law of a
    model without time.
    """

    steps: int
    rank: Rank = "confidence"

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"steps={self.steps} must be 1 or more")

    def pick(self, step: Step) -> Bool[Array, " T"]:
        """Marks them."""
        left = jnp.maximum(self.steps - step.number, 1)
        count = -(-step.open.sum() // left)
        return _first(count, _rank(step, self.rank), step.open)


@dataclasses.dataclass(frozen=True)
class Above(Show):
    """All whose drawn token is at least as probable as `chance`, and the most probable one."""

    chance: float = 0.9

    def pick(self, step: Step) -> Bool[Array, " T"]:
        """Marks them."""
        best = _first(jnp.ones((), jnp.int32), step.chance, step.open)
        return best | (step.open & (step.chance >= self.chance))


@dataclasses.dataclass(frozen=True)
class Bound(Show):
    """Those of least entropy, while the entropies before the last sum to `nats` or less.

    So much at most is lost by drawing them independently of each other.
    """

    nats: float = 0.1

    def pick(self, step: Step) -> Bool[Array, " T"]:
        """Marks them."""
        entropy = -_rank(step, "entropy")
        order = _order(entropy, step.open)
        sums = jnp.cumsum(entropy[order])
        kept = jnp.concatenate([jnp.ones(1, bool), sums[:-1] <= self.nats])
        return jnp.zeros(len(order), bool).at[order].set(kept) & step.open


@dataclasses.dataclass(frozen=True)
class Chance(Show):
    """Each by a draw of its own, as the schedule has it: ancestral sampling in `steps`.

    All that is left is shown in the last step.
    """

    steps: int
    schedule: Schedule = LINEAR

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"steps={self.steps} must be 1 or more")

    def pick(self, step: Step) -> Bool[Array, " T"]:
        """Marks them."""
        ends = 1 - (step.number + jnp.arange(2)) / self.steps
        now, then = self.schedule.masked(jnp.maximum(ends, 0.0))
        chance = jnp.where(step.number + 1 < self.steps, 1 - then / now, 2.0)
        return step.open & (_luck(step) < chance)

    def share(self, number, count, last, key):
        """That of the schedule."""
        return self.schedule.masked(jnp.maximum(1 - number / self.steps, 0.0))


@dataclasses.dataclass(frozen=True)
class FirstHitting(Show):
    """One token a step, any alike, and the time at which it is shown: ancestral, exactly.

    In continuous time the first of `n` masked tokens is shown where the share masked is
    `u ** (1 / n)` of what it was, for a uniform `u`, whatever the schedule.
    Source: Zheng et al. 2024, arXiv 2409.02908; BD3-LM, 2503.09573.
    """

    def pick(self, step: Step) -> Bool[Array, " T"]:
        """Marks it."""
        return _first(jnp.ones((), jnp.int32), _luck(step), step.open)

    def share(self, number, count, last, key):
        """That of the moment of the next token."""
        return last * uniform(key, ()) ** (1 / jnp.maximum(count, 1))


class Filled(struct.PyTreeNode):
    """`tokens` `[B, T]`; `shown` `[B, T]`, the step that showed each, -1 if it was given;
    `steps`, how many times the model was called."""

    tokens: Int[Array, "B T"]
    shown: Int[Array, "B T"]
    steps: Int[Array, ""]


def sample(
    denoise: Denoise,
    tokens: Int[Array, "B T"],
    key: Array,
    *,
    mask_id: int,
    show: Show,
    law: Law = PLAIN,
    block: int | None = None,
    end: int | None = None,
    most: int | None = None,
) -> Filled:
    """Fills what is masked.

    Args:
      denoise: `(tokens [B, T], share masked [B]) -> logits [B, T, V]`; see `guided`. The
        share is of the whole canvas, what is given included; where a `show` goes by the
        time, of what was masked so many as are expected to be left.
      tokens: what is given, and `mask_id` where it is to be filled.
      key: one for all, or one for each row `[B]`, see `autoregressive.by_row`.
      mask_id: the token that says "masked"; it is never drawn.
      show: which are shown in a step.
      law: what is made of the logits before one draws; penalties for repetition are none.
      block: if given, blocks of so many tokens are filled one after the other.
      end: if given, masks that follow an `end` become `end`, once all before it is shown;
        those of a prompt, before the first mask, end nothing.
      most: of steps, after which what is masked stays; no bound if not given.

    Raises:
      InputError: tokens that are no rows of ids; blocks that do not divide T; a penalty; a
        mask that is no token of the model; tokens without a mask, where they are at hand.
    """
    check(tokens, mask_id, block, law)
    B, T = tokens.shape
    size = T if block is None else block
    keys = by_row(key, B)
    of, at = jnp.arange(T) // size, jnp.broadcast_to(jnp.arange(T), (B, T))
    since = begins(tokens, mask_id)
    reveal = revealer(show, law, mask_id, T)

    def go_on(carry):
        state, *_, step = carry
        some = (state[0] == mask_id).any()
        return some if most is None else some & (step < most)

    def told(key, step, number, masked, opened, begun, last):
        """The share masked that the model is told of a row, and that of its block."""
        when = jax.random.split(jax.random.fold_in(key, step), 3)[2]
        own = show.share(number, opened.sum(), last, when)
        if own is None:
            return masked.mean(), last
        return ((masked & ~opened).sum() + own * begun) / T, own

    def body(carry):
        (tokens, shown), (block_of, number, begun, last), step = carry
        masked = tokens == mask_id
        first = jnp.where(masked, of[None], T).min(1)
        opened = masked & (of[None] == first[:, None])
        fresh = first != block_of
        number, last = jnp.where(fresh, 0, number), jnp.where(fresh, 1.0, last)
        begun = jnp.where(fresh, opened.sum(1), begun)
        steps = jnp.full(B, step)
        share, last = jax.vmap(told)(keys, steps, number, masked, opened, begun, last)
        new = reveal(keys, steps, number, at, denoise(tokens, share), tokens, opened)
        new = new if end is None else closed(new, end, mask_id, since)
        shown = jnp.where((new != tokens) & masked, step, shown)
        return (new, shown), (first, number + 1, begun, last), step + 1

    zeros = jnp.zeros(B, jnp.int32)
    state = (tokens, jnp.full((B, T), -1, jnp.int32))
    start = (state, (zeros - 1, zeros, zeros, jnp.ones(B)), jnp.int32(0))
    (tokens, shown), _, steps = jax.lax.while_loop(go_on, body, start)
    return Filled(tokens, shown, steps)


def check(tokens: Array, mask_id: int, block: int | None, law: Law) -> None:
    """Raises InputError for what cannot be filled; see `sample`."""
    if tokens.ndim != 2 or tokens.dtype != jnp.int32:
        raise InputError(
            f"tokens are {tokens.dtype} of shape {tokens.shape} and must be int32 ids [B, T]; "
            "a canvas alone is tokens[None]"
        )
    T = tokens.shape[1]
    if block is not None and (block < 1 or T % block):
        raise InputError(f"block={block} must divide the canvas of {T} tokens")
    if law.looks_back:
        raise InputError("unmasking has no order; set repetition=1 in its law")
    if not isinstance(tokens, Tracer):
        none = (np.asarray(tokens) != mask_id).all(1)  # Also where others are traced.
        if none.any():
            raise InputError(
                f"row {int(none.argmax())} has nothing masked: put mask_id={mask_id} where "
                "tokens are to be filled in"
            )


def revealer(show: Show, law: Law, mask_id: int, length: int) -> Callable[..., Array]:
    """Makes the function of one step: tokens `[B, t]`, of which some are shown now.

    It is called with, in this order: `keys` `[B]`; `steps` and `number` `[B]`, the row's
    and those of its block; the places `at` `[B, t]` of the tokens in a canvas of `length`;
    `logits` `[B, t, V]`; `tokens` and `opened` `[B, t]`. What is drawn at a place does not
    depend on which others are looked at.
    """

    def row(key, step, number, at, logits, tokens, opened):
        draws, picks = (
            jax.random.split(k, length)[at]
            for k in jax.random.split(jax.random.fold_in(key, step), 3)[:2]
        )
        V = logits.shape[-1]
        if not 0 <= mask_id < V:
            raise InputError(
                f"mask_id={mask_id} is no token of the model, whose ids end at {V - 1}"
            )
        ids = jnp.arange(V)[None]
        logits = jnp.where(ids == mask_id, -jnp.inf, logits.astype(jnp.float32))
        token = law.draw(draws, logits)
        chance = jnp.take_along_axis(jax.nn.softmax(logits), token[:, None], 1)[:, 0]
        step = Step(opened, number, logits, token, chance, picks)
        return jnp.where(show.pick(step), token, tokens)

    return jax.vmap(row)


def begins(tokens: Int[Array, "B T"], mask_id: int) -> Int[Array, " B"]:
    """Where the first mask of each row stands: an `end` before it ends no text."""
    return jnp.argmax(tokens == mask_id, 1)


def closed(
    tokens: Int[Array, "B T"], end: int, mask_id: int, since: Int[Array, " B"]
) -> Int[Array, "B T"]:
    """With `end` in the place of every mask after an `end` before which nothing is masked.

    Those that stand before `since` are a prompt's, which may have some.
    """
    before = jnp.cumsum(tokens == mask_id, 1) == 0
    before &= jnp.arange(tokens.shape[1])[None] >= since[:, None]
    over = jnp.cumsum((tokens == end) & before, 1) > 0
    return jnp.where(over & (tokens == mask_id), end, tokens)


def guided(denoise: Denoise, given: Bool[Array, "B T"], scale: float, mask_id: int) -> Denoise:
    """Guidance without a classifier: away from what is guessed where `given` is masked too.

    Logits are `without + (1 + scale) (with - without)`: LLaDA's; 0 is no guidance. What is
    ruled out, by a logit of -inf with what is given, stays so.
    Source: Nie et al. 2024, arXiv 2410.18514.
    """

    def denoise_both(tokens, share):
        hidden = jnp.where(given, mask_id, tokens)
        shares = jnp.concatenate([share, (hidden == mask_id).mean(1)])
        with_it, without = jnp.split(denoise(jnp.concatenate([tokens, hidden]), shares), 2)
        found = without + (1 + scale) * (with_it - without)
        return jnp.where(jnp.isneginf(with_it) | jnp.isneginf(without), with_it, found)

    return denoise_both


def _first(count, score, open: Bool[Array, " T"]) -> Bool[Array, " T"]:
    """Marks the `count` open ones of the greatest score; ties go to the first."""
    order = _order(-score, open)
    rank = jnp.zeros(len(order), jnp.int32).at[order].set(jnp.arange(len(order)))
    return open & (rank < count)


def _order(cost: Float[Array, " T"], open: Bool[Array, " T"]) -> Int[Array, " T"]:
    """Places by rising cost; what is not open last, and before it what costs no number.

    So that of a model that gives none, too, a token is shown in every step.
    """
    return jnp.lexsort((jnp.where(jnp.isnan(cost), jnp.inf, cost), ~open))


def _rank(step: Step, by: Rank) -> Float[Array, " T"]:
    """What is shown first has the greatest."""
    if by == "confidence":
        return step.chance
    if by == "random":
        return _luck(step)
    if by == "margin":
        first, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(step.logits), 2)[0], -1, 0)
        return first - second
    if by == "entropy":
        log = jax.nn.log_softmax(step.logits)
        return jnp.where(jnp.isneginf(log), 0, jnp.exp(log) * log).sum(-1)
    raise InputError(f"rank={by!r} must be one of confidence, margin, entropy, random")


def _luck(step: Step) -> Float[Array, " T"]:
    """A uniform number for each token, by its own key."""
    return jax.vmap(lambda key: uniform(key, ()))(step.keys)
