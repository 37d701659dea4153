"""Language models that see an image as tiles, laid together with a token for each new line.

Source: Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge".
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxformer.layers.connect import splice
from jaxformer.layers.embed import Embedding
from jaxformer.models.vlm import VLM, looks


class TiledVLM(VLM):
    """Tokens `[B, T]`, tiles and their order to logits `[B, T, V]`, float32.

    `model.apply({"params": params}, tokens, tiles, order)`: tiles `[B, n, Y, X, C]` are
    those of all images of a row; `order` `[B, F]` says which feature stands in each place:
    feature `i` of tile `j` is `j * s + i`, the learned new line `n * s`, and -1 is none.
    `data.tiles.order` makes it.

    Raises:
      ValueError: places that are not as many as features, where neither is traced; where
        they are, such a row is NaN.
    """

    # The resolutions that images are resized to, in pixels: of data.tiles.
    pinpoints: tuple[tuple[int, int], ...] = ((336, 672), (672, 336), (672, 672))

    def setup(self):
        self.newline = Embedding(self.language.table.width)

    def hidden(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: Int[Array, "B T"],
        tiles: Float[Array, "B n ..."] | None = None,
        order: Int[Array, "B F"] | None = None,
        *,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        fresh: bool = False,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """What the logits are made of; further inputs as of `VLM`."""
        x = self.language.embed(tokens)
        line = self.newline(1)
        if tiles is not None and order is not None:
            check(tokens, self.image, order)
            features = self.encode(tiles, train)
            B, n, s, D = features.shape
            line = jnp.broadcast_to(line.astype(features.dtype)[None], (B, 1, D))
            features = jnp.concatenate([features.reshape(B, n * s, D), line], 1)
            seen = jnp.take_along_axis(features, jnp.clip(order, 0, n * s)[..., None], 1)
            here = tokens == self.image
            fits = here.sum(1) == (order >= 0).sum(1)
            # A count that does not fit is not trained on in silence.
            x = jnp.where(fits[:, None, None], splice(x, seen, here), jnp.nan)
        how: dict[str, Any] = looks(tokens, segments, None, None)
        if positions is not None:
            how["positions"] = positions
        return self.language.run(x, fresh=fresh, train=train, **how)


def check(tokens: Int[Array, "B T"], image: int, order: Int[Array, "B F"]) -> None:
    """Raises ValueError where a row has not as many places as features.

    Args:
      tokens: with `image` in the place of each feature. Nothing is checked of traced ones.
      image: the token.
      order: as of `TiledVLM`.
    """
    if isinstance(tokens, Tracer) or isinstance(order, Tracer):
        return
    found, wanted = (np.asarray(x).sum(1) for x in (tokens == image, order >= 0))
    for row in np.flatnonzero(found != wanted)[:1]:
        raise ValueError(
            f"row {row} has {found[row]} image tokens (id {image}) and its tiles have "
            f"{wanted[row]} features with new lines; write as many as data.tiles.order says"
        )
