"""Language models that are told how much is masked, by adaLN-zero in each block.

A model that unmasks can do without (MDLM, arXiv 2406.07524, LLaDA, 2502.09992: it sees the
masks). MD4 (2406.04329) and block diffusion's first models are told all the same.
"""

from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float, Int

from jaxformer.layers.timestep import AdaBlock, AdaNorm, TimestepEmbed
from jaxformer.models.decoder import Decoder, LanguageModel
from jaxformer.ops.timestep import cosines_first

Share = Float[Array, " B"] | Float[Array, "B T"]


class TimedDecoder(Decoder):
    """A decoder whose blocks and last norm heed `share`, how much of a row is masked.

    `model.apply({"params": params}, tokens, share)`, with `share` `[B]`, or `[B, T]`
    where tokens of one row have times of their own. A new one has blocks that do nothing.
    Its `features` of time are DiT's and MDLM's; MD4's are `ops.timestep.sines_first`.
    """

    block: Callable[..., nn.Module] = AdaBlock
    condition: int = 128  # width of what is made of the time.
    features: Callable[..., Array] = cosines_first

    def setup(self):
        super().setup()
        self.time = TimestepEmbed(self.condition, features=self.features)
        self.last = AdaNorm(self.norm(self.epsilon)) if self.last_norm else None

    def parts(self) -> LanguageModel:
        """The parts but for the last norm, which heeds the time too."""
        return super().parts().clone(norm=None, parent=None)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tokens: Int[Array, "B T"], share: Share, **inputs
    ) -> Float[Array, "B T V"]:
        return self.logits(self.hidden(tokens, share=share, **inputs))

    def hidden(self, tokens: Int[Array, "B T"], **inputs) -> Float[Array, "B T D"]:
        """See `LanguageModel.hidden`."""
        return self.run(self.model.embed(tokens), **inputs)

    def run(
        self,
        x: Float[Array, "B T D"],
        *,
        share: Share,
        **inputs,
    ) -> Float[Array, "B T D"]:
        """See `LanguageModel.run`."""
        condition = self.time(share[:, None] if share.ndim == 1 else share)
        x = self.model.run(x, condition=condition, **inputs)
        return x if self.last is None else self.last(x, condition)
