"""What attention keeps of the tokens it has seen, so that it need not see them again.

A cache is the collection "cache" of a model: a tree with one `KV` for each attention, of
static shape. `empty` makes it; `model.apply({"params": params, "cache": cache}, tokens,
positions=positions, mutable=["cache"])` gives the result and the cache with these tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxformer.ops.attention import attend_lse
from jaxformer.ops.mask import Positions


class KV(struct.PyTreeNode):
    """Keys and values of one attention, as they are after norm and rotation.

    A token lies in the slot of its position, modulo the number of slots where there is a
    `window`: a ring, which needs no more slots than the window has. A slot of position -1
    is empty. What comes at position -1 or beyond the last slot is left out. A stack of
    layers has a leading axis of layers in each. A token sees what stands before it, or all
    of its `block`, see `ops.mask.Positions`.
    """

    k: Any  # [B, K, S, H], as products read them; or the same by shape.
    v: Any
    positions: Any  # [B, S], int32.
    window: int | None = struct.field(pytree_node=False, default=None)
    block: int | None = struct.field(pytree_node=False, default=1)

    @property
    def slots(self) -> int:
        """How many tokens it has room for."""
        return self.positions.shape[-1]

    @classmethod
    def of(cls, k: Array, v: Array, at: Int[Array, "B T"], window: int | None) -> KV:
        """Of keys and values `[B, T, K, H]` of tokens at positions `at`."""
        return cls(k.swapaxes(1, 2), v.swapaxes(1, 2), at, window)

    def write(self, new: KV) -> KV:
        """With new tokens, the last ones of a ring; both may be stacks of layers."""
        S, at = self.slots, new.positions
        at = at[(0,) * (at.ndim - 2)]  # Each layer has them at the same places.
        slot = jnp.where(at < 0, S, at)
        if self.window is not None:
            last = at.max(1, keepdims=True)
            slot = jnp.where((at < 0) | (at <= last - S), S, at % S)
        row = jnp.arange(len(at))[:, None]

        def put(kept: Array, new: Array) -> Array:
            lead = (slice(None),) * (self.positions.ndim - 2)
            if kept.ndim == self.positions.ndim:
                return kept.at[*lead, row, slot].set(new, mode="drop")
            # Where an index stands on both sides of a slice, rows and slots come first.
            new = jnp.moveaxis(new.astype(kept.dtype), (-4, -2), (0, 1))
            return kept.at[*lead, row, :, slot].set(new, mode="drop")

        return jax.tree.map(put, self, new)

    def until(self, at: Int[Array, "B T"]) -> KV:
        """Only what stands before tokens at positions `at`: the text is taken back to there."""
        first = jnp.where(at < 0, jnp.iinfo(at.dtype).max, at).min(1, keepdims=True)
        first = first.reshape((1,) * (self.positions.ndim - 2) + first.shape)
        return self.replace(positions=jnp.where(self.positions >= first, -1, self.positions))

    def around(self, at: Int[Array, "B T"]) -> KV:
        """What stands before and after tokens at positions `at`, which are side by side.

        A look at it goes both ways. -1 is no token.
        """
        lead = (1,) * (self.positions.ndim - 2)
        last = at.max(1, keepdims=True)
        first = jnp.where(at < 0, jnp.iinfo(at.dtype).max, at).min(1, keepdims=True)
        first, last = (x.reshape(lead + x.shape) for x in (first, last))
        inside = (self.positions >= first) & (self.positions <= last)
        return self.replace(positions=jnp.where(inside, -1, self.positions), block=None)

    def beside(self, new: KV) -> KV:
        """New tokens after those of the cache before them, for one look at all of them."""
        old = self.until(new.positions)
        pairs = ((old.k, new.k, 2), (old.v, new.v, 2), (old.positions, new.positions, 1))
        k, v, at = (jnp.concatenate([a, b.astype(a.dtype)], axis) for a, b, axis in pairs)
        return self.replace(k=k, v=v, positions=at)

    def look(
        self, q: Float[Array, "B T N H"], at: Int[Array, "B T"], *, slopes=None, **options
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
        """Attention of queries at positions `at` to what is kept, and its logsumexp.

        A cache of one row serves any number of rows of queries: a prefix that they share.
        `slopes` are those of ALiBi, `options` those of `attend`.
        """
        B, T, N, H = q.shape
        shared = len(self.k) == 1 and B > 1
        if shared:
            q, at = q.reshape(1, B * T, N, H), at.reshape(1, B * T)
        mask = Positions(at, self.positions, self.window, self.block)
        k, v = (x.astype(q.dtype).swapaxes(1, 2) for x in (self.k, self.v))
        if slopes is not None:
            apart = jnp.abs(at[:, None, :, None] - self.positions[:, None, None, :])
            options["bias"] = -jnp.asarray(slopes)[None, :, None, None] * apart
        y, lse = attend_lse(q, k, v, mask=mask, **options)
        if shared:
            y, lse = y.reshape(B, T, N, H), lse.reshape(N, B, T).swapaxes(0, 1)
        return y, lse


def join(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Attention to several sets of keys, from that to each: outputs and logsumexps."""
    (y, lse), *rest = parts
    for other, other_lse in rest:
        both = jnp.logaddexp(lse, other_lse)
        safe = jnp.where(jnp.isneginf(both), 0, both)
        weights = (jnp.exp(x - safe).swapaxes(1, 2)[..., None] for x in (lse, other_lse))
        mine, theirs = (w.astype(y.dtype) for w in weights)
        y, lse = mine * y + theirs * other, both
    return y, lse


def empty(
    model: nn.Module,
    variables: Mapping[str, Any],
    batch: int,
    length: int,
    *,
    spare: int = 0,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """A cache of a model without a token in it: the collection "cache".

    Args:
      model: called with tokens `[B, T]` and `positions=`, such as `decoder.LanguageModel`.
      variables: `{"params": params}`, or the same by shape.
      batch: rows.
      length: the greatest number of tokens in a row, prompt and all.
      spare: so many more slots than its window a ring has: as many tokens as one takes
        back again after they were written (those that speculative decoding rejects).
      given: what the model is called with beside them, or the same by shape, such as the
        `context` of an encoder-decoder.
    """

    def run(variables, given):
        tokens = jnp.zeros((batch, length), jnp.int32)
        at = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
        how: dict[str, Any] = {"positions": at, "mutable": ["cache"], **given}
        return model.apply(variables, tokens, **how)[1]["cache"]

    seen: Any = nn.unbox(jax.eval_shape(run, variables, dict(given or {})))

    def blank(kv: KV) -> KV:
        S = length if kv.window is None else min(length, kv.window + spare)
        *lead, K, _, H = kv.k.shape
        # Two arrays, so that both may be given away.
        k, v = (jnp.zeros((*lead, K, S, H), kv.k.dtype) for _ in range(2))
        return kv.replace(k=k, v=v, positions=jnp.full((*lead, S), -1, jnp.int32))

    return each(blank, seen)


def slots(cache: Any) -> int | None:
    """How many tokens of a row a cache has room for; None where rings are all it has."""
    whole = [kv.slots for kv in kvs(cache) if kv.window is None]
    return min(whole, default=None)


def kvs(cache: Any) -> list[KV]:
    """The `KV`s of a cache."""
    return jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, KV))


def take(cache: Any, rows: Int[Array, " n"]) -> Any:
    """A cache of these rows, in this order."""
    return _by_row(lambda x, axis: jnp.take(x, rows, axis), cache)


def put(cache: Any, rows: Int[Array, " n"], other: Any) -> Any:
    """A cache in which these rows are those of an `other`."""

    def one(x: Array, axis: int, y: Array) -> Array:
        return x.at[(slice(None),) * axis + (rows,)].set(y)

    return _by_row(one, cache, other)


def _by_row(change, cache, *others):
    """`change(leaf, the axis of its rows, *others' leaves)` for each leaf."""

    def one(kv: KV, *others: KV) -> KV:
        axis = kv.k.ndim - 4
        return jax.tree.map(lambda x, *y: change(x, axis, *y), kv, *others)

    return each(one, cache, *others)


def each(change, cache: Any, *others: Any) -> Any:
    """`change` of each `KV` of a cache, and of those that others have in its place."""
    return jax.tree.map(change, cache, *others, is_leaf=lambda x: isinstance(x, KV))


class Stepper(struct.PyTreeNode):
    """A model's step with a cache, as samplers take it: a function that is a pytree too.

    `Stepper(model, {"params": params})`; the model has the methods `hidden` and `logits` of
    `decoder.LanguageModel`. `variables` may hold a "prefix", which all rows share. `prompt`
    is what `hidden` is given beside the prompts alone, such as `{"images": images}`, and
    `then` what it is given beside the tokens that follow.
    """

    model: nn.Module = struct.field(pytree_node=False)
    variables: Mapping[str, Any]
    prompt: Mapping[str, Any] = struct.field(default_factory=dict)
    then: Mapping[str, Any] = struct.field(default_factory=dict)

    @classmethod
    def prompted(
        cls,
        model: nn.Module,
        variables: Mapping[str, Any],
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        given: Mapping[str, Any],
    ) -> Stepper:
        """Of a model whose prompts, of so many `lengths`, come with what is `given`.

        A model that needs more than the cache after them, such as one whose text looks at
        images again and again, has a method `prompted` that tells, see `models.vlm.VLM`.
        """
        prompt, then = given, {}
        if given and hasattr(model, "prompted"):
            how: dict[str, Any] = {"method": "prompted", **given}
            prompt, then = model.apply(variables, tokens, lengths, **how)
        return cls(model, variables, prompt, then)

    def __call__(
        self,
        cache: Any,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        fresh: bool = False,
        read: Int[Array, "B R"] | None = None,
    ) -> tuple[Float[Array, "B R V"], Any]:
        """Logits after the tokens in the columns `read`, or all; and the cache with them.

        Position -1 is no token; with `fresh` the cache holds nothing yet.
        """
        model, variables = self.model, dict(self.variables)
        at = jnp.broadcast_to(positions, tokens.shape)
        # What is kept is looked at as a prefix, and gets the new tokens of all layers at
        # once: a loop over layers that changed it would copy it whole for each token.
        if not fresh and "prefix" not in variables:
            variables["prefix"] = each(lambda kv: kv.until(at), cache)
        else:
            variables["cache"] = cache
        how: dict[str, Any] = {"positions": at, "fresh": fresh, "mutable": ["cache"]}
        how |= self.prompt if fresh else self.then
        x, new = model.apply(variables, tokens, method="hidden", **how)
        new = new["cache"]
        if "cache" not in variables:
            new = each(KV.write, cache, new)
        x = x if read is None else jnp.take_along_axis(x, read[..., None], 1)
        logits: Any = model.apply(variables, x, method="logits")
        return logits, new
