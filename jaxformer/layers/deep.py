"""Blocks of a language model to whose results features of images are added.

Source: DeepStack, Meng et al. 2024, arXiv 2406.04334; Qwen3-VL, 2511.21631.
"""

from jaxtyping import Array, Float

from jaxformer.layers.block import Block


class DeepBlock(Block):
    """A block after which `deep[index]` is added; with no index, or nothing, a plain one.

    `deep` are vectors for all tokens, 0 where no image stands.
    """

    index: int | None = None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        deep: tuple[Float[Array, "B T D"], ...] = (),
        **inputs,
    ) -> Float[Array, "B T D"]:
        x = super().__call__(x, **inputs)
        return x if self.index is None or not deep else x + deep[self.index]
