"""DiT whose early tokens are to say what an encoder sees of the clean picture: REPA.

Yu et al. 2024 (arXiv 2410.06940).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.layers.einsum import Einsum
from jaxformer.models.dit import DiT
from jaxformer.ops.activation import silu


class Projector(nn.Module):
    """Tokens through three linear layers, SiLU between, to those of an encoder."""

    width: int
    hidden: int = 2048
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        def linear(name: str, size: int) -> Einsum:
            return Einsum("BTC,CW->BTW", {"W": size}, True, self.dtype, name=name)

        x = silu(linear("first", self.hidden)(x))
        x = silu(linear("second", self.hidden)(x))
        return linear("out", self.width)(x)


class AlignedDiT(DiT):
    """A `DiT` with a projector from its first `align_at` blocks to tokens of width `seen`.

    It is called as any other; `align` is the same and gives the projected tokens too.
    REPA has `align_at=8` and DINOv2's patches, as many as the DiT has tokens.
    """

    seen: int = 768
    align_at: int = 8
    projector: int = 2048

    def setup(self):
        super().setup()
        self.project = Projector(self.seen, self.projector, self.dtype)

    def __call__(
        self,
        x: Float[Array, "B Y X C"],
        t: Float[Array, "B ..."],
        label: Int[Array, " B"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B Y X O"]:
        made, early = self.denoiser.with_early(x, t, label, train=train)
        if self.is_initializing():
            self.project(early)
        return made

    def align(
        self,
        x: Float[Array, "B Y X C"],
        t: Float[Array, "B ..."],
        label: Int[Array, " B"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B Y X O"], Float[Array, "B T W"]]:
        """What the model says, and what it thinks that the encoder sees."""
        made, early = self.denoiser.with_early(x, t, label, train=train)
        return made, self.project(early)

    def _depths(self) -> list[tuple[int, float | tuple[float, ...]]]:
        """Layers before and after the projector, and the rate at which each is left out."""
        if self.context_from or not 0 < self.align_at < self.depth:
            raise ValueError(
                f"align_at={self.align_at} must be a layer, from 1 to depth - 1 = "
                f"{self.depth - 1}, and context_from={self.context_from} be 0"
            )
        last = max(self.depth - 1, 1)
        rates = tuple(self.drop_path * i / last for i in range(self.depth))
        return [
            (self.align_at, rates[: self.align_at]),
            (self.depth - self.align_at, rates[self.align_at :]),
        ]
