"""Native-resolution language models whose first layers see early layers of the encoder too.

Source: Qwen3-VL, Bai et al. 2025, arXiv 2511.21631.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.layers.block import Chain
from jaxformer.layers.connect import splice
from jaxformer.models.native import NativeEncoder, NativeVLM


class DeepEncoder(NativeEncoder):
    """An encoder that is read after its layers `taps` too.

    Its `stack` is a `Chain` of which the first parts end with these layers.
    """

    taps: tuple[int, ...] = ()

    def encode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        patches: Float[Array, "B T P"],
        grids: Int[Array, "B n 3"],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], ...]:
        """All patches after the last layer, and then after each of the taps."""
        x, block, pool = self.embed(patches, grids, train=train)
        stack: Chain = self.stack  # pyright: ignore[reportAssignmentType]
        found = []
        for part in stack.parts:
            x = part(x, train=train, **block)
            found.append(self._back(x, pool))
        return (found[-1], *found[: len(self.taps)])


class DeepVLM(NativeVLM):
    """A `NativeVLM` with a connector more for each tap of its `DeepEncoder`.

    What the i-th of `mergers` makes is added after the language model's `DeepBlock` of
    index i, in the places of images and videos.
    """

    mergers: tuple[nn.Module, ...] = ()

    def encode(
        self, patches: Float[Array, "B T P"], grids: Int[Array, "B n 3"], train: bool = False
    ) -> tuple[Float[Array, "B s D"], ...]:
        """What the language model reads of a row's images, and then what is added later."""
        x, *taps = self.vision.encode(patches, grids, train=train)
        deep = (merge(tap) for merge, tap in zip(self.mergers, taps, strict=True))
        return (self.connector(x), *deep)

    def _see(self, x, features, here, fits, how):
        features, *deep = features
        nothing = jnp.zeros_like(x)
        how["deep"] = tuple(splice(nothing, one, here) for one in deep)
        return super()._see(x, features, here, fits, how)
