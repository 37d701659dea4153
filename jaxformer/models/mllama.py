"""Llama 3.2 Vision: tiles that are read at several depths, and text that looks at them.

Source: Grattafiori et al. 2024 (Llama 3, arXiv 2407.21783), and the code of transformers
(`mllama`), whose quirks are kept: padding sees, and is seen by, what is none.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.block import Chain, Stack
from jaxformer.layers.gated import Sighted
from jaxformer.layers.tiles import PaddingApart, Served, TileEmbed, TileVectors, counts
from jaxformer.models.flamingo import latest
from jaxformer.models.vlm import VLM, check, looks


class TiledEncoder(nn.Module):
    """An image's tiles to `[B, n * T, D * (1 + m)]`: from the end, and from `m` places before.

    Tokens of a tile are padded to a `multiple`, and all tiles of an image see each other.
    The parts of `local` follow each other; after each but the last a look is taken. Then
    `after` is added to what `norm` gives, and `whole` comes to the end. Of the looks those
    of one channel stand side by side.
    """

    embed: TileEmbed
    local: tuple[nn.Module, ...]
    norm: nn.Module
    after: TileVectors
    whole: nn.Module
    multiple: int = 8

    def encode(
        self,
        images: Float[Array, "B n Y X C"],
        number: Int[Array, " B"],
        *,
        train: bool = False,
    ) -> Float[Array, "B s E"]:
        """All tokens, tile by tile, the class token first; `number` is the ratio's."""
        x = self.embed(images, number)
        B, n, T, D = x.shape
        spare = -T % self.multiple
        x = jnp.pad(x, ((0, 0), (0, 0), (0, spare), (0, 0)))
        there = jnp.arange(n)[None] < counts(self.embed.ratios, number)[:, None]
        real = there[..., None] & (jnp.arange(T + spare) < T)[None, None]
        mask = PaddingApart(real.reshape(B, -1))
        x, looks = x.reshape(B, -1, D), []
        for part in self.local:
            x = part(x, mask=mask, train=train)
            looks.append(x)
        x = self.norm(x).reshape(B, n, -1, D) + self.after(number)[:, :, None]
        x = self.whole(x.reshape(B, -1, D).astype(looks[0].dtype), mask=mask, train=train)
        found = [x]
        if looks[:-1]:
            found.append(jnp.stack(looks[:-1], -1).reshape(B, x.shape[1], -1))
        x = jnp.concatenate(found, -1).reshape(B, n, T + spare, -1)
        return x[:, :, :T].reshape(B, n * T, -1)


class Mllama(VLM):
    """A `VLM` whose text has one token `image` for each image, and looks at its tiles.

    `model.apply({"params": params}, tokens, images, ratios)`: images are `[B, m, n, Y, X,
    C]`, rows of up to `m` images of `n` tiles, and `ratios` `[B, m]` their numbers, see
    `layers.tiles`. A token sees the last image before it in its segment, and those that
    stand before that one side by side with it. `language` has `Sighted` layers with
    `ServedBlock`s. Without images it is the language model alone.

    `features` are what `encode` gave, in the place of images, and `seen` the first and the
    last image that each token sees: how a cache goes on, as of `Flamingo`.
    """

    def prompted(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], **given: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `VLM`: what follows sees the last images of the prompt."""
        kept = {"ratios": given["ratios"]}
        kept["features"] = self.encode(given["images"], given["ratios"])
        seen = neighbours(tokens == self.image)
        seen = jnp.take_along_axis(seen, lengths[:, None, None] - 1, 1)
        return kept, kept | {"seen": seen}

    def encode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Float[Array, "B m n Y X C"],
        ratios: Int[Array, "B m"],
        train: bool = False,
    ) -> Float[Array, "B m s D"]:
        """What the language model reads of images."""
        B, m = images.shape[:2]
        tiles = images.reshape(B * m, *images.shape[2:])
        x = self.connector(self.vision.encode(tiles, ratios.reshape(-1), train=train))
        return x.reshape(B, m, *x.shape[1:])

    def hidden(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: Int[Array, "B T"],
        images: Float[Array, "B m n Y X C"] | None = None,
        ratios: Int[Array, "B m"] | None = None,
        *,
        features: Float[Array, "B m s D"] | None = None,
        seen: Int[Array, "B T 2"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        fresh: bool = False,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """What the logits are made of; further inputs as of `VLM`."""
        x = self.language.embed(tokens)
        how = looks(tokens, segments, None, None)
        if positions is not None:
            how["positions"] = positions
        if images is not None and ratios is not None:
            features = self.encode(images, ratios, train)
        elif images is not None or (features is not None and ratios is None):
            raise ValueError("images have ratios: the number of each one's aspect ratio")
        if features is not None and ratios is not None:
            B, m, s, _ = features.shape
            if seen is None:
                check(tokens, self.image, m, 1)
                seen = neighbours(tokens == self.image, segments)
            x = jnp.where((seen[..., 1] <= m)[..., None], x, jnp.nan)  # As of `Flamingo`.
            number = self._numbers(ratios, s)
            how["context"] = features.reshape(B, m * s, -1)
            how["context_mask"] = Served(seen[..., 0], seen[..., 1], number)
        return self.language.run(x, fresh=fresh, train=train, **how)

    def _numbers(self, ratios: Int[Array, "B m"], size: int) -> Int[Array, "B S"]:
        """The image of each feature, from 1, and 0 for tiles of padding."""
        embed = self.vision.embed
        tile = jnp.arange(size) // (size // embed.tiles)
        real = tile[None, None] < counts(embed.ratios, ratios)[..., None]
        number = jnp.where(real, 1 + jnp.arange(ratios.shape[1])[None, :, None], 0)
        return number.reshape(len(ratios), -1)


def neighbours(
    here: Bool[Array, "B T"], segments: Int[Array, "B T"] | None = None
) -> Int[Array, "B T 2"]:
    """The first and the last image, from 1, that each token sees; 0 for none.

    >>> neighbours(jnp.array([[False, True, True, False, True, False]]))[0].tolist()
    [[0, 0], [1, 1], [1, 2], [1, 2], [3, 3], [3, 3]]
    """
    last = latest(here, segments)
    before = jnp.pad(here, ((0, 0), (1, 0)))[:, :-1]
    if segments is not None:
        before &= segments == jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    begins = jnp.where(here & ~before, jnp.cumsum(here, 1), 0)
    first = jnp.where(last > 0, jnp.maximum.accumulate(begins, axis=1), 0)
    return jnp.stack([first, last], -1)


def sighted(stack: nn.Module) -> nn.Module:
    """The same layers, whose chains hand the context to those that look at it alone."""
    if isinstance(stack, Stack):
        return stack.clone(block=sighted(stack.block))
    return Sighted(tuple(map(sighted, stack.parts))) if isinstance(stack, Chain) else stack
