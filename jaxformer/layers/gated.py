"""Gated cross-attention: layers that let a language model see, and that begin as nothing."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.layers.block import Block, Chain, Stack
from jaxformer.ops.mask import Mask
from jaxformer.sharding import partitioned


class Gate(nn.Module):
    """A branch times the tanh of a learned number that begins at 0."""

    @nn.compact
    def __call__(self, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale = self.param("scale", partitioned(nn.initializers.zeros, ""), ())
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
            elif context is not None or not isinstance(part, GatedBlock):
                x = part(x, **seen, **inputs)
        return x


def _sees(part: Any) -> bool:
    if isinstance(part, Stack):
        return _sees(part.block)
    return isinstance(part, GatedBlock | Sighted)
