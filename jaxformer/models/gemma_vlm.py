"""Language models whose images see themselves whole, in text that is causal.

Source: Gemma 3, Kamath et al. 2025, arXiv 2503.19786.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.layers.connect import splice
from jaxformer.models.vlm import VLM, check
from jaxformer.ops.mask import Causal, Segments


class GemmaVLM(VLM):
    """A `VLM` in which the features of each image see each other both ways.

    All else is causal, an image's view of what stands before it too. Where layers have a
    window, no image has more features than that.
    """

    def hidden(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: Int[Array, "B T"],
        images: Float[Array, "B n ..."] | None = None,
        *,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        fresh: bool = False,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """What the logits are made of; inputs as of `VLM`."""
        x = self.language.embed(tokens)
        how: dict[str, Any] = {"segments": segments}
        if images is not None:
            features = self.encode(images, train)
            B, n, s, _ = features.shape
            check(tokens, self.image, n, s)
            here = tokens == self.image
            x = splice(x, features.reshape(B, n * s, -1), here)
            number = 1 + (jnp.cumsum(here, 1) - 1) // s
            how["mask"] = Causal() | Segments(jnp.where(here, number, 0))
        if positions is not None:
            how["positions"] = positions
        return self.language.run(x, fresh=fresh, train=train, **how)
