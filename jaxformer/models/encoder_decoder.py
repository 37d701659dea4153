"""An encoder and a decoder that looks at what it says, both of a language model's parts.

Sources: Vaswani et al. 2017 (arXiv 1706.03762), T5 (1910.10683).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.models.decoder import LanguageModel
from jaxformer.ops.mask import Segments


class EncoderDecoder(nn.Module):
    """Tokens `[B, T]` to logits `[B, T, V]` of the next one, in sight of a `source` `[B, S]`.

    The source's tokens are those of the encoder, and -1 is none of them: padding, which is
    not looked at. `objectives.next_token.NextToken(inputs=("tokens", "source"))` trains it.
    A text is written with a cache by the decoder alone, in sight of what `encode` gives:

        context = model.apply(variables, source, method="encode")
        given = {"context": context, "source": source}
        cache = layers.cache.empty(model, variables, batch, length, given=given)
        step = layers.cache.Stepper(model, variables, prompt=given, then=given)
    """

    encoder: LanguageModel  # With `causal=False`; its logits are not asked for.
    decoder: LanguageModel  # Its stack is of `layers.block.CrossBlock`.

    def __call__(
        self, tokens: Int[Array, "B T"], source: Int[Array, "B S"], **inputs
    ) -> Float[Array, "B T V"]:
        return self.logits(self.hidden(tokens, source, **inputs))

    def encode(self, source: Int[Array, "B S"]) -> Float[Array, "B S C"]:
        """What the decoder looks at."""
        real = (source >= 0).astype(jnp.int32)
        return self.encoder.hidden(jnp.maximum(source, 0), segments=real)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        source: Int[Array, "B S"],
        *,
        context: Float[Array, "B S C"] | None = None,
        **inputs,
    ) -> Float[Array, "B T D"]:
        """What the logits are made of; `context` is the source as `encode` gives it.

        Further inputs are those of `LanguageModel.run`, of the decoder.
        """
        context = self.encode(source) if context is None else context
        seen = Segments(jnp.ones_like(tokens), (source >= 0).astype(jnp.int32))
        return self.decoder.hidden(tokens, context=context, context_mask=seen, **inputs)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of what `hidden` gives, or of any part of it."""
        return self.decoder.logits(x)
