"""Language models that see images and videos as large as they are, with M-RoPE.

Sources: Qwen2-VL (Wang et al. 2024, arXiv 2409.12191) and Qwen2.5-VL (Bai et al. 2025,
2502.13923). `layers.native` has the encoder's parts, `ops.mrope` the positions.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.connect import splice
from jaxformer.layers.native import NativeEmbed, regroup
from jaxformer.models.vlm import VLM
from jaxformer.ops.mrope import decode_delta, multimodal_places


class NativeEncoder(nn.Module):
    """Patches of images and videos to a vector each, before they are merged."""

    embed: NativeEmbed
    stack: nn.Module

    def encode(
        self,
        patches: Float[Array, "B T P"],
        grids: Int[Array, "B n 3"],
        *,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """All patches after the last layer, in the order in which they came."""
        x, block, pool = self.embed(patches, grids, train=train)
        return self._back(self.stack(x, train=train, **block), pool)

    def _back(self, x: Array, pool) -> Float[Array, "B T D"]:
        if "order" not in pool:
            return x
        return regroup(x, jnp.argsort(pool["order"]), self.embed.side**2)


class NativeVLM(VLM):
    """Tokens `[B, T]`, patches and grids to logits `[B, T, V]`, float32.

    `model.apply({"params": params}, tokens, patches, grids)`, with the latter two as
    `data.native.rows` makes them: a row has the patches of its own images and videos, in
    the order of their places, which are the tokens `image` and `video`. The language
    model's rotary is an `MRotary`: text stands where `ops.mrope` says, and by positions
    where there are no images. `seconds` `[B, n]` are those of a frame of each video, 1 if
    not given, where the model has a `rate`: so many places a second.

    After a prompt a cache goes on with what `delta` gives, see `prompted`.

    Raises:
      ValueError: places that are not as many as a row's grids have merged tokens, where
        neither is traced; where they are, such a row is NaN.
    """

    video: int | None = None  # another token for places; those of `image` serve both.
    rate: int | None = None  # None: each frame of a video is one place on.

    def encode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, patches: Float[Array, "B T P"], grids: Int[Array, "B n 3"], train: bool = False
    ) -> Any:
        """What the language model reads of a row's images, in order: `[B, s, D]`."""
        return self.connector(self.vision.encode(patches, grids, train=train))

    def prompted(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], **given: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `VLM`: what follows stands farther on than it is in the row."""
        delta = self.delta(tokens, given["grids"], lengths, given.get("seconds"))
        return given, {"delta": delta}

    def hidden(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: Int[Array, "B T"],
        patches: Float[Array, "B P C"] | None = None,
        grids: Int[Array, "B n 3"] | None = None,
        *,
        seconds: Float[Array, "B n"] | None = None,
        delta: Int[Array, " B"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        fresh: bool = False,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """What the logits are made of; further inputs as of `LanguageModel.run`."""
        x = self.language.embed(tokens)
        how: dict[str, Any] = {"segments": segments}
        if patches is not None and grids is not None:
            here, merged = self._places(tokens, positions), self.merged(grids)
            check(here, merged)
            fits = here.sum(1) == merged.prod(-1).sum(1)
            features = self.encode(patches, grids, train)
            x = self._see(x, features, here, fits, how)
            pace = self._pace(merged, seconds)
            how["places"] = multimodal_places(here, merged, segments=segments, pace=pace)
        elif delta is not None and positions is not None:
            at = positions + delta[:, None]
            how["places"] = jnp.broadcast_to(at[..., None], (*at.shape, 3))
        if positions is not None:
            how["positions"] = positions
        return self.language.run(x, fresh=fresh, train=train, **how)

    def _see(self, x, features, here, fits, how) -> Float[Array, "B T D"]:
        """Tokens with features in their places; more inputs of the layers go to `how`."""
        # A count that does not fit is not trained on in silence.
        return jnp.where(fits[:, None, None], splice(x, features, here), jnp.nan)

    def _places(self, tokens, positions) -> Bool[Array, "B T"]:
        here = tokens == self.image
        if self.video is not None:
            here |= tokens == self.video
        return here if positions is None else here & (positions >= 0)

    def merged(self, grids: Int[Array, "B n 3"]) -> Int[Array, "B n 3"]:
        """Frames, rows and columns of merged tokens, of those of patches."""
        side = self.vision.embed.side
        return grids // jnp.array([1, side, side])[None, None]

    def delta(
        self,
        tokens: Int[Array, "B T"],
        grids: Int[Array, "B n 3"],
        lengths: Int[Array, " B"] | None = None,
        seconds: Float[Array, "B n"] | None = None,
    ) -> Int[Array, " B"]:
        """What tokens after a prompt of so many `lengths` go on with, see `decode_delta`."""
        at = jnp.arange(tokens.shape[1])[None]
        real = jnp.ones_like(tokens, bool) if lengths is None else at < lengths[:, None]
        here = self._places(tokens, None) & real
        merged = self.merged(grids)
        pace = self._pace(merged, seconds)
        return decode_delta(multimodal_places(here, merged, pace=pace), real)

    def _pace(self, merged, seconds) -> Float[Array, "B n"] | None:
        if self.rate is None:
            return None
        return self.rate * (jnp.ones(merged.shape[:2]) if seconds is None else seconds)


def check(here: Bool[Array, "B T"], merged: Int[Array, "B n 3"]) -> None:
    """Raises ValueError where a row has not as many places as features.

    Args:
      here: the places.
      merged: frames, rows and columns of merged tokens. Nothing is checked of traced ones.
    """
    if isinstance(here, Tracer) or isinstance(merged, Tracer):
        return
    found, wanted = np.asarray(here).sum(1), np.asarray(merged).prod(-1).sum(1)
    for row in np.flatnonzero(found != wanted)[:1]:
        grids = [tuple(map(int, g)) for g in np.asarray(merged)[row] if g.any()]
        raise ValueError(
            f"row {row} has {found[row]} image or video tokens and its grids {grids} have "
            f"{wanted[row]} features; write as many tokens as frames x rows x columns"
        )
