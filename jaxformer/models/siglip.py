"""SigLIP and SigLIP 2: two towers, each pair of an image and a text judged by itself.

Sources: Zhai et al. 2023 (arXiv 2303.15343), Alabdulmohsin et al. 2023 (2305.13035) for
So400m, Tschannen et al. 2025 (2502.14786) for SigLIP 2.
"""

import dataclasses
import math

import flax.linen as nn

from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import GridPosition, PatchEmbed
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pack import PackedAttentionPool, PackedEmbed, PackedPosition
from jaxformer.layers.pool import AttentionPool
from jaxformer.layers.text import Last, TokenEmbed
from jaxformer.models.clip import Numbers, TwoTowers
from jaxformer.models.vit import SIZES as VIT
from jaxformer.models.vit import Size
from jaxformer.ops.activation import gelu_tanh


class SigLIP(Numbers):
    """SigLIP by its numbers: no class token, a probe reads the image (MAP).

    Texts are seen whole, padding too, and read off their last token: pad them to `length`.
    The embedding is as wide as the tower of images.

    Example:
      >>> named("B/16@256").size
      (256, 256)
    """

    def parts(self) -> TwoTowers:
        """The parts that these numbers stand for.

        Raises:
          ValueError: heads that do not divide the width; a patch that does not divide the
            size.
        """
        D, W, dtype = self.vision.width, self.text.width, self.dtype
        vision = self._encoder(
            self._embed(),
            self._stack(self.vision, gelu_tanh, 1e-6),
            LayerNorm(parent=None),
            self._pool()(
                self._attention(self.vision), self._mlp(self.vision, gelu_tanh), parent=None
            ),
        )
        text = self._encoder(
            TokenEmbed(self.vocab, W, self.length, dtype=dtype, parent=None),
            self._stack(self.text, gelu_tanh, 1e-6),
            LayerNorm(parent=None),
            Last(parent=None),
            Einsum("BD,DP->BP", {"P": D}, True, dtype, parent=None),
        )
        return TwoTowers(vision, text, math.log(10), -10.0, parent=None)

    def _embed(self) -> nn.Module:
        D, options = self.vision.width, {"channels": self.channels, "dtype": self.dtype}
        position = GridPosition(D, shape=self._grid(), parent=None)
        return PatchEmbed(self.patch, D, position, **options, parent=None)

    def _pool(self) -> type[nn.Module]:
        return AttentionPool


class NaFlex(SigLIP):
    """SigLIP 2 for images of any shape, one in a row of patches or several.

    `model.apply({"params": params}, patches, grids, tokens)`, see `layers.pack.PackedEmbed`;
    logits are of all images of all rows. Positions are of images of `size`, and resized to
    each image's grid. `data.pack.pack` makes the patches.
    """

    def _embed(self) -> nn.Module:
        D, options = self.vision.width, {"channels": self.channels, "dtype": self.dtype}
        position = PackedPosition(D, self._grid(), parent=None)
        return PackedEmbed(self.patch, D, position, **options, parent=None)

    def _pool(self) -> type[nn.Module]:
        return PackedAttentionPool


# Towers of images and of texts; g has SigLIP 2 alone, with the texts' tower of So400m.
SIZES = {
    "B": (VIT["B"], VIT["B"]),
    "L": (VIT["L"], VIT["L"]),
    "So400m": (VIT["So400m"], VIT["So400m"]),
    "g": (Size(1536, 40, 6144, 16), VIT["So400m"]),
}
VOCAB = {1: 32_000, 2: 256_000}  # by version.


def named(name: str, version: int = 1, **fields) -> SigLIP:
    """A SigLIP by its usual name, such as `named("So400m/14@384")`; other fields as given.

    Args:
      name: SIZE/PATCH, at 224 pixels, or SIZE/PATCH@PIXELS, of which what is short of a
        patch is left out (of 384 pixels 14 takes 378); SIZE/PATCH@naflex is NaFlex, with
        positions of 16 x 16 patches.
      version: 2 for SigLIP 2, which has the same towers with more words.
      **fields: what else is to be other than usual.

    Raises:
      ValueError: another name or version.
    """
    letter, _, rest = name.partition("/")
    patch, at, side = rest.partition("@")
    kind = NaFlex if side == "naflex" else SigLIP
    if kind is NaFlex and patch.isdecimal():
        side = str(16 * int(patch))
    side = side if at else "224"
    if letter not in SIZES or not patch.isdecimal() or not side.isdecimal():
        raise ValueError(
            f"{name!r} is no SigLIP; write SIZE/PATCH@PIXELS with a size of {', '.join(SIZES)}"
        )
    if version not in VOCAB:
        raise ValueError(f"version={version} must be 1 or 2")
    vision, text = SIZES[letter]
    pixels = int(side) // int(patch) * int(patch)
    size = pixels, pixels
    made = kind(vision, text, int(patch), size, VOCAB[version], length=64)
    return dataclasses.replace(made, **fields)
