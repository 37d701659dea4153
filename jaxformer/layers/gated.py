"""Gated cross-attention: layers that let a language model see, and that begin as nothing."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.layers.block import Block, Chain, Stack
from jaxformer.layers.tiles import Served
from jaxformer.ops.mask import Mask
from jaxformer.sharding import constrain, partitioned


class Gate(nn.Module):
    """A branch times the tanh of a learned number, which begins as `initial`."""

    initial: float = 0.0

    @nn.compact
    def __call__(self, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        init = partitioned(nn.initializers.constant(self.initial), "")
        scale = self.param("scale", init, ())
        return y * jnp.tanh(scale).astype(y.dtype)


class GatedBlock(Block):
    """Attention to a `context` `[B, S, C]` and an MLP, each behind a gate that begins shut.

    At first it gives back what it is given. `context_mask` says which of the context a
    token sees; one that sees none gets nothing from the attention.

    Sources: Alayrac et al. 2022 (Flamingo, arXiv 2204.14198); Llama 3.2 Vision's code.
    """

    @nn.compact
    def __call__(
        self,
        x,
        *,
        context: Float[Array, "B S C"],
        context_mask: Mask | None = None,
        train=False,
        drop_path_rate=None,
        **inputs,  # Of the blocks beside it.
    ):
        options = {"train": train, "drop_path_rate": drop_path_rate}
        y = self.attention(self.normed(x, "attention_norm"), context, mask=context_mask)
        x += Gate(name="attention_gate")(self.branch(y, "attention", **options))
        y = self.mlp(self.normed(x, "mlp_norm"), train=train)
        return x + Gate(name="mlp_gate")(self.branch(y, "mlp", **options))


class HalfOpenBlock(Block):
    """A block whose branches are behind gates that begin at tanh(pi / 4), about 0.66.

    Source: the second encoder of Llama 3.2 Vision's images.
    """

    @nn.compact
    def __call__(self, x, *, train=False, drop_path_rate=None, **inputs):
        options = {"train": train, "drop_path_rate": drop_path_rate}
        x = constrain(x, "BTD")
        y = self.attention(self.normed(x, "attention_norm"), **inputs)
        x += Gate(math.pi / 4, name="attention_gate")(self.branch(y, "attention", **options))
        y = self.mlp(self.normed(x, "mlp_norm"), train=train)
        y = Gate(math.pi / 4, name="mlp_gate")(self.branch(y, "mlp", **options))
        return constrain(x + y, "BTD")


class ServedBlock(GatedBlock):
    """A `GatedBlock` as of Llama 3.2 Vision: the MLP is for tokens that see an image alone.

    `context_mask` is a `tiles.Served`: a token without an image looks at all of the context,
    padding and all, as in the code of transformers.
    """

    @nn.compact
    def __call__(
        self, x, *, context, context_mask=None, train=False, drop_path_rate=None, **inputs
    ):
        options = {"train": train, "drop_path_rate": drop_path_rate}
        y = self.attention(self.normed(x, "attention_norm"), context, mask=context_mask)
        x += Gate(name="attention_gate")(self.branch(y, "attention", **options))
        y = self.mlp(self.normed(x, "mlp_norm"), train=train)
        if isinstance(context_mask, Served):
            y = jnp.where(context_mask.blind[..., None], 0, y)
        return x + Gate(name="mlp_gate")(self.branch(y, "mlp", **options))


class Sighted(Chain):
    """A chain with `GatedBlock`s among its parts, to which alone the context is given.

    Without a context they are left out: the model is the language model that it was made
    of. `Stack(Sighted((gated, block, block)), 4)` sees before each second layer.
    """

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        context: Float[Array, "B S C"] | None = None,
        context_mask: Mask | None = None,
        **inputs,
    ) -> Float[Array, "B T D"]:
        seen = {"context": context, "context_mask": context_mask}
        for part in self.parts:
            if not _sees(part):
                x = part(x, **inputs)
            elif context is not None or not _gated(part):
                x = part(x, **seen, **inputs)
        return x


def _sees(part: Any) -> bool:
    if isinstance(part, Stack):
        return _sees(part.block)
    return isinstance(part, GatedBlock | Sighted)


def _gated(part: Any) -> bool:
    """Whether it is nothing but layers that look at the context."""
    if isinstance(part, Stack):
        return _gated(part.block)
    return isinstance(part, GatedBlock)
