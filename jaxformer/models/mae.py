"""MAE: an encoder of the patches that are shown, and a decoder that draws the others.

Which are shown is data: an image's patches are sorted by its `noise`, and those with the
least are shown, always as many. Source: He et al. 2022, arXiv 2111.06377.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Remat, Stack
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import Embedding, FixedPosition, PatchEmbed, Tokens
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import Average, First
from jaxformer.models import vit
from jaxformer.models.vit import Encoder, Size
from jaxformer.sharding import constrain

SIZES = {name: vit.SIZES[name] for name in ("B", "L", "H")}
DECODER = Size(width=512, depth=8, mlp_dim=2048, num_heads=16)  # Of all three.


def named(name: str, **fields) -> "MAE":
    """An MAE by its usual name: `named("B/16", ratio=0.75)`; other fields as given."""
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdecimal():
        raise ValueError(
            f"{name!r} is no MAE; write SIZE/PATCH with a size of {', '.join(SIZES)}"
        )
    return MAE(**{"encoder": SIZES[size], "patch": int(patch), **fields})


class Masking(NamedTuple):
    """Which patches are shown."""

    kept: Int[Array, "B K"]  # their places, by rising noise.
    restore: Int[Array, "B T"]  # where each patch stands when all are sorted by noise.
    mask: Float[Array, "B T"]  # 1 for a patch that is not shown.


def masking(noise: Float[Array, "B T"], ratio: float) -> Masking:
    """Shows the `int(T * (1 - ratio))` patches of least noise.

    Raises:
      ValueError: a ratio that is not in [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} must be at least 0 and less than 1")
    count = int(noise.shape[1] * (1 - ratio))
    order = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(order, axis=1)
    return Masking(order[:, :count], restore, (restore >= count).astype(jnp.float32))


class Visible(nn.Module):
    """The tokens of `embed`; where there is `noise`, only the patches that are shown.

    The tokens before the patches always stay.
    """

    embed: PatchEmbed
    ratio: float = 0.75

    def setup(self):
        nn.share_scope(self, self.embed)

    def __call__(
        self,
        images: Float[Array, "B Y X C"],
        noise: Float[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> Tokens:
        tokens = self.embed(images, train=train)
        if noise is None:
            return tokens
        count = (images.shape[1] // self.embed.patch) * (images.shape[2] // self.embed.patch)
        if noise.shape != (len(images), count):
            raise ValueError(
                f"noise has shape {noise.shape} and must be ({len(images)}, {count}), one "
                "number for each patch"
            )
        lead = tokens.x.shape[1] - count
        kept = masking(noise, self.ratio).kept
        patches = jnp.take_along_axis(tokens.x[:, lead:], kept[..., None], axis=1)
        x = jnp.concatenate([tokens.x[:, :lead], patches], 1)
        return tokens._replace(x=constrain(x, "BTD"))


class Decoder(nn.Module):
    """From the tokens of the shown patches to the pixels of all."""

    width: int
    position: nn.Module
    stack: nn.Module
    norm: nn.Module
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S C"],
        shown: Masking,
        grid: tuple[int, int],
        pixels: int,
        *,
        train: bool = False,
    ) -> Float[Array, "B T P"]:
        x = Einsum("BTC,CD->BTD", {"D": self.width}, True, self.dtype, name="embed")(x)
        B, T = shown.restore.shape
        lead = x.shape[1] - shown.kept.shape[1]
        mask = Embedding(self.width, name="mask")(1).astype(self.dtype)
        mask = jnp.broadcast_to(mask, (B, T + lead - x.shape[1], self.width))
        patches = jnp.concatenate([x[:, lead:], mask], 1)
        patches = jnp.take_along_axis(patches, shown.restore[..., None], axis=1)
        x = jnp.concatenate([x[:, :lead], patches], 1)
        x += self.position(*grid).astype(self.dtype)[None]
        x = self.norm(self.stack(x, train=train))
        x = Einsum("BTD,DP->BTP", {"P": pixels}, True, self.dtype, name="head")(x)
        return x[:, lead:].astype(jnp.float32)


class Autoencoder(nn.Module):
    """Images to the pixels of their patches, by parts.

    The encoder's `embed` is a `Visible`. `normalize` says what the numbers drawn mean:
    pixels by the mean and deviation of their patch, or pixels, see
    `objectives.reconstruct.targets`; it changes nothing that is computed here.
    """

    encoder: Encoder
    decoder: Decoder
    normalize: bool = True

    @property
    def patch(self) -> int:
        """Pixels of a patch's side."""
        return self.encoder.embed.embed.patch  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(
        self,
        images: Float[Array, "B Y X C"],
        noise: Float[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T P"], Float[Array, "B T"]]:
        B, Y, X, C = images.shape
        y, x = Y // self.patch, X // self.patch
        seen = self.encoder.encode(images, noise, train=train)
        shown = masking(
            jnp.zeros((B, y * x)) if noise is None else noise,
            0.0 if noise is None else self.encoder.embed.ratio,  # pyright: ignore
        )
        pixels = self.patch**2 * C
        return self.decoder(seen, shown, (y, x), pixels, train=train), shown.mask

    def features(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B D"]:
        """One vector of each image, of which all patches are shown."""
        return self.encoder.features(images, train=train)

    def encode(
        self,
        images: Float[Array, "B Y X C"],
        noise: Float[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B S D"]:
        """The class token and the shown patches, by rising noise, after the last norm."""
        return self.encoder.encode(images, noise, train=train)


class MAE(nn.Module):
    """Masked autoencoder by its numbers; `parts()` is the same as an `Autoencoder`.

    `model.apply({"params": params}, images, noise)` gives the pixels of all patches
    `[B, T, P]`, `P = patch * patch * C` in the order of `ops.patches.patchify`, and the
    mask `[B, T]`, 1 for a patch that was not shown. Without noise all are shown. Sizes
    have widths that 4 divides, for the positions. `size` is as in `models.vit.ViT`; with
    it and `channels` the parts can be saved as transformers' ViTMAE.
    """

    encoder: Size
    patch: int
    decoder: Size = DECODER
    ratio: float = 0.75  # of the patches that are not shown.
    size: tuple[int, int] | None = None
    channels: int | None = None  # None: any number.
    pool: Literal["cls", "gap"] = "cls"  # of `features`.
    normalize: bool = True  # as in `Autoencoder`.
    remat: Remat = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.whole = self.parts()
        nn.share_scope(self, self.whole)  # Its parameters are this module's.

    def __call__(
        self,
        images: Float[Array, "B Y X C"],
        noise: Float[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T P"], Float[Array, "B T"]]:
        return self.whole(images, noise, train=train)

    def features(
        self, images: Float[Array, "B Y X C"], *, train: bool = False
    ) -> Float[Array, "B D"]:
        """One vector of each image, of which all patches are shown."""
        return self.whole.features(images, train=train)

    def encode(
        self,
        images: Float[Array, "B Y X C"],
        noise: Float[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B S D"]:
        """The class token and the shown patches, by rising noise, after the last norm."""
        return self.whole.encode(images, noise, train=train)

    def parts(self) -> Autoencoder:
        """The parts that these numbers stand for.

        Raises:
          ValueError: heads that do not divide their width; an unknown pool.
        """
        if self.pool not in ("cls", "gap"):
            raise ValueError(f"pool={self.pool!r} must be one of cls, gap")
        grid = None
        if self.size is not None:
            grid = (self.size[0] // self.patch, self.size[1] // self.patch)
        D, dtype = self.encoder.width, self.dtype
        position = FixedPosition(D, grid, prefix=1, parent=None)
        same = {"channels": self.channels, "dtype": dtype, "parent": None}
        embed = PatchEmbed(self.patch, D, position, prefix=1, **same)
        pool = First(parent=None) if self.pool == "cls" else Average(1, parent=None)
        D = self.decoder.width
        return Autoencoder(
            Encoder(
                Visible(embed, self.ratio, parent=None),
                self._stack("encoder"),
                LayerNorm(parent=None),
                pool,
                dtype=dtype,
                parent=None,
            ),
            Decoder(
                D,
                FixedPosition(D, grid, prefix=1, parent=None),
                self._stack("decoder"),
                LayerNorm(parent=None),
                dtype=dtype,
                parent=None,
            ),
            self.normalize,
            parent=None,
        )

    def _stack(self, name: str) -> Stack:
        size = getattr(self, name)
        D, N = size.width, size.num_heads
        if D % N:
            raise ValueError(f"{name}: num_heads={N} must divide width={D}")
        same = {"use_bias": True, "dtype": self.dtype, "parent": None}
        block = Block(Attention(N, D // N, **same), Mlp(size.mlp_dim, **same), parent=None)
        return Stack(block, size.depth, self.remat, self.unroll, parent=None)


def flops(model: MAE, shape: tuple[int, int, int] = (224, 224, 3)) -> int:
    """Floating-point operations of one image forward, as `models.vit.flops` counts them."""
    Y, X, C = shape
    patches = (Y // model.patch) * (X // model.patch)
    pixels = model.patch**2 * C
    shown = int(patches * (1 - model.ratio))

    def stack(size: Size, T: int) -> int:
        D = size.width
        return size.depth * (4 * T * D * D + 2 * T * T * D + 2 * T * D * size.mlp_dim)

    encoder, decoder = model.encoder, model.decoder
    ends = patches * pixels * encoder.width + (patches + 1) * pixels * decoder.width
    joint = (shown + 1) * encoder.width * decoder.width
    return 2 * (ends + joint + stack(encoder, shown + 1) + stack(decoder, patches + 1))
