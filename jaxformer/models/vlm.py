"""Language models that see: an encoder of images, a connector, and a decoder, by parts.

Sources: LLaVA (Liu et al. 2023, arXiv 2304.08485 and 2310.03744) for features in the place
of tokens; PaliGemma (Beyer et al. 2024, 2407.07726) for a prefix that sees itself whole.
`layers.connect` has the connectors.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.connect import splice
from jaxformer.models import decoder, vit
from jaxformer.models.decoder import places
from jaxformer.ops.mask import Causal, Mask, Prefix, Segments


class Early(nn.Module):
    """An encoder's tokens before its last parts, which are kept and not run.

    `encoder` has no norm at its end; `rest` are the layers and the norm that come after it
    in the original: LLaVA reads CLIP before its last layer, and its files have that layer.
    """

    encoder: Any
    rest: tuple[nn.Module, ...] = ()

    def encode(self, *inputs, train: bool = False) -> Float[Array, "B T D"]:
        """All tokens, in the order of the embedding."""
        x = self.encoder.encode(*inputs, train=train)
        if self.is_initializing():
            y = x
            for part in self.rest:
                y = part(y)
        return x


class VLM(nn.Module):
    """Tokens `[B, T]` and images to logits `[B, T, V]`, float32.

    `model.apply({"params": params}, tokens, images)`. Images are `[B, n, Y, X, C]`, or what
    else the encoder takes with those two axes first: a row has up to `n` of them, and the
    places of its tokens `image` take their features in order. What a row has no places for
    is not looked at, so that rows may have different numbers of images. Without images all
    is text.

    `vision` has a method `encode`, images to tokens `[B, t, C]`, of which the first `skip`
    are left out (a class token); `language` is a `decoder.Decoder` or `LanguageModel`.
    Several samples stand in a row by `segments`, as there; images are in the order of their
    places. What `prefix` marks sees its segment's prefix both ways (PaliGemma). All
    segments of a row see its first `shared` tokens, and count their positions from there:
    many questions about one image, which is encoded once.

    Raises:
      ValueError: places that are not those of whole images, or of more than there are,
        where tokens are not traced; where they are, a row without a feature for one of its
        places is NaN.
    """

    vision: Any
    connector: nn.Module  # [B, t, C] -> [B, s, D]
    language: Any
    image: int  # the token in whose places features stand.
    skip: int = 0

    @property
    def vocab(self) -> int:
        """How many tokens there are."""
        table = getattr(self.language, "table", self.language)
        return table.vocab

    def __call__(self, tokens: Int[Array, "B T"], *inputs, **options) -> Float[Array, "B T V"]:
        return self.logits(self.hidden(tokens, *inputs, **options))

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """See `LanguageModel.logits`."""
        return self.language.logits(x)

    def encode(self, images: Float[Array, "B n ..."], train: bool = False) -> Array:
        """What the language model reads of images: `[B, n, s, D]`."""
        B, n = images.shape[:2]
        x = self.vision.encode(images.reshape(B * n, *images.shape[2:]), train=train)
        x = self.connector(x[:, self.skip :])
        return x.reshape(B, n, *x.shape[1:])

    def prompted(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], **given: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `hidden` is given beside prompts, and beside the tokens that follow them.

        Args:
          tokens: of any content behind their `lengths`.
          lengths: of the prompts.
          **given: beside the prompts by who calls.
        """
        return given, {}

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        images: Float[Array, "B n ..."] | None = None,
        shared: Int[Array, " B"] | None = None,
        *,
        prefix: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        fresh: bool = False,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """What the logits are made of; further inputs as of `LanguageModel.run`."""
        x = self.language.embed(tokens)
        if images is not None:
            features = self.encode(images, train)
            B, n, s, _ = features.shape
            check(tokens, self.image, n, s)
            x = splice(x, features.reshape(B, n * s, -1), tokens == self.image)
        how = looks(tokens, segments, prefix, shared)
        if positions is not None:
            how["positions"] = positions
        return self.language.run(x, fresh=fresh, train=train, **how)


def looks(tokens, segments, prefix, shared) -> dict[str, Any]:
    """Who sees whom, and from where positions count: inputs of `LanguageModel.run`."""
    if prefix is None and shared is None:
        return {"segments": segments}
    own = jnp.ones_like(tokens) if segments is None else segments
    mask: Mask = Causal()
    if prefix is not None:
        mask |= Segments(jnp.where(prefix.astype(bool), own, 0))
    if shared is None:
        return {"segments": segments, "mask": mask}
    first = shared[:, None]
    at = jnp.arange(tokens.shape[1])[None]
    at = jnp.where(at < first, at, first + places(own))
    return {"mask": mask & (Segments(own) | Prefix(shared)), "positions": at}


def check(tokens: Int[Array, "B T"], image: int, count: int, size: int) -> None:
    """Raises ValueError where a row's places are not those of whole images that are there.

    Args:
      tokens: with `image` in the place of each feature. Nothing is checked of traced ones.
      image: the token.
      count: the most images of a row.
      size: features of an image.
    """
    if isinstance(tokens, Tracer):
        return
    found = (np.asarray(tokens) == image).sum(1)
    for row in np.flatnonzero((found % size > 0) | (found > count * size))[:1]:
        raise ValueError(
            f"row {row} has {found[row]} image tokens (id {image}), and each of its up to "
            f"{count} images has {size} features; write {size} image tokens for each image"
        )


def flops(model: VLM, text: Sequence[int], images: Sequence[int], *rest: Any) -> int:
    """Floating-point operations of one row forward, as `decoder.flops` counts them.

    `text` is (T,), `images` (n, Y, X, C). For a `vit.ViT` and a `Decoder`; the connector is
    not counted.
    """
    count, *shape = images
    Y, X, C = shape
    seen = count * vit.flops(model.vision.clone(num_classes=0), (Y, X, C))
    return seen + decoder.flops(model.language, tuple(text))
