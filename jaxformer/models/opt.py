"""OPT: a decoder of learned positions whose table begins two rows early.

Source: Zhang et al. 2022 (arXiv 2205.01068); the sizes that have norms before each branch.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.layers.block import Remat
from jaxformer.layers.embed import Embedding
from jaxformer.layers.norm import LayerNorm
from jaxformer.models.decoder import Decoder, LanguageModel
from jaxformer.ops.activation import relu

OFFSET = 2  # rows before that of position 0; position -1, which is padding, has the second.


class ShiftedPositions(nn.Module):
    """A learned vector for each of `length` positions, after `OFFSET` rows of none."""

    length: int
    width: int

    @nn.compact
    def __call__(self, positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = Embedding(self.width, name="position")(self.length + OFFSET)
        return table[jnp.maximum(positions, -1) + OFFSET]


@dataclasses.dataclass(frozen=True)
class Size:
    """What a named size fixes; MLPs are four times as wide."""

    width: int
    depth: int
    num_heads: int


SIZES = {
    "125M": Size(768, 12, 12),
    "1.3B": Size(2048, 24, 32),
    "2.7B": Size(2560, 32, 32),
    "6.7B": Size(4096, 32, 32),
    "13B": Size(5120, 40, 40),
    "30B": Size(7168, 48, 56),
    "66B": Size(9216, 64, 72),
}


def named(
    name: str,
    vocab: int = 50_272,
    *,
    remat: Remat = "none",
    dtype: DTypeLike = jnp.float32,
    **fields: Any,
) -> LanguageModel:
    """OPT by its usual size, `named("2.7B")`, of 2,048 tokens; other fields as of `Decoder`.

    Raises:
      ValueError: a size that is not known.
    """
    if name not in SIZES:
        raise ValueError(f"{name!r} is no OPT; known are {', '.join(SIZES)}")
    size = SIZES[name]
    made = Decoder(
        vocab,
        size.width,
        size.depth,
        4 * size.width,
        size.num_heads,
        positions="none",
        norm=LayerNorm,
        epsilon=1e-5,
        activation=relu,
        gated=False,
        use_bias=True,
        remat=remat,
        dtype=dtype,
        **{"length": 2048, **fields},
    )
    position = ShiftedPositions(made.length or 2048, size.width)
    return made.parts().clone(position=position)
