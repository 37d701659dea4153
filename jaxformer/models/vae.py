"""Autoencoders: images to small maps of numbers or codes, and back.

Sources: Rombach et al. 2022 (arXiv 2112.10752) for the KL autoencoder of Stable Diffusion,
van den Oord et al. 2017 (1711.00937) for VQ-VAE, Esser et al. 2021 (2012.09841) for VQ-GAN,
Isola et al. 2017 (1611.07004) for its critic of patches.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.layers.convolve import Conv, Decoder, Encoder, GroupNorm
from jaxformer.sharding import partitioned

# Scale and shift of latents by the name of a model, and how many channels they have.
SIZES: dict[str, dict[str, Any]] = {
    "sd": {"scale": 0.18215},
    "sdxl": {"scale": 0.13025},
    "sd3": {"latent": 16, "scale": 1.5305, "shift": 0.0609, "mixes": False},
}


def named(name: str, **fields) -> "KLAutoencoder":
    """The KL autoencoder of a model by its name; other fields as given.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in SIZES:
        raise ValueError(f"{name!r} is no autoencoder; known are {', '.join(SIZES)}")
    return KLAutoencoder(**{**SIZES[name], **fields})


class Gaussian(NamedTuple):
    """A normal law of every number of a map: what an image may have been encoded as."""

    mean: Float[Array, "B y x C"]
    log_variance: Float[Array, "B y x C"]

    def draw(self, key: Array | None) -> Float[Array, "B y x C"]:
        """One draw, or the mean without a key."""
        if key is None:
            return self.mean
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self.log_variance / 2) * noise


class KLAutoencoder(nn.Module):
    """Images `[B, Y, X, C]` of -1 to 1 to latents `[B, Y / 8, X / 8, latent]`, and back.

    `encode` gives latents as a diffusion model takes them: a draw (or the mean, without a
    key), less `shift`, times `scale`; `decode` takes such latents. `posterior` is the law
    itself, unscaled. Called, it gives images again and the law that they came from.
    """

    widths: Sequence[int] = (128, 256, 512, 512)
    depth: int = 2
    channels: int = 3
    latent: int = 4
    groups: int = 32
    looks: bool = True
    mixes: bool = True  # channels, after the encoder and before the decoder.
    scale: float = 0.18215
    shift: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self):
        def mix(width: int) -> Conv | None:
            return Conv(width, 1, padding=(0, 0), dtype=self.dtype) if self.mixes else None

        how = (self.groups, self.looks, self.dtype)
        self.encoder = Encoder(self.widths, self.depth, 2 * self.latent, *how)
        self.decoder = Decoder(self.widths, self.depth, self.channels, *how)
        self.encoded, self.decoded = mix(2 * self.latent), mix(self.latent)

    def __call__(
        self, images: Float[Array, "B Y X C"], key: Array | None = None
    ) -> tuple[Float[Array, "B Y X C"], Gaussian]:
        law = self.posterior(images)
        return self._decode(law.draw(key)), law

    def posterior(self, images: Float[Array, "B Y X C"]) -> Gaussian:
        """What the images may be encoded as."""
        if images.shape[-1] != self.channels:
            raise ValueError(
                f"images have {images.shape[-1]} channels; the model takes {self.channels}"
            )
        x = self.encoder(images)
        x = x if self.encoded is None else self.encoded(x)
        mean, log_variance = jnp.split(x.astype(jnp.float32), 2, -1)
        return Gaussian(mean, jnp.clip(log_variance, -30.0, 20.0))

    def encode(
        self, images: Float[Array, "B Y X C"], key: Array | None = None
    ) -> Float[Array, "B y x Z"]:
        """Latents as a diffusion model takes them."""
        return (self.posterior(images).draw(key) - self.shift) * self.scale

    def decode(self, latents: Float[Array, "B y x Z"]) -> Float[Array, "B Y X C"]:
        """Images of such latents."""
        if latents.shape[-1] != self.latent:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels; the model has {self.latent}"
            )
        return self._decode(latents / self.scale + self.shift)

    def _decode(self, z: Array) -> Array:
        z = z if self.decoded is None else self.decoded(z)
        return self.decoder(z).astype(jnp.float32)


class Codes(NamedTuple):
    """Maps as the nearest vectors of a table."""

    vectors: Float[Array, "B y x C"]  # the table's, with the gradient of what they stand for.
    ids: Int[Array, "B y x"]
    chosen: Float[Array, "B y x C"]  # the table's, with the gradient of the table.
    given: Float[Array, "B y x C"]  # what they stand for.


class Codebook(nn.Module):
    """A table of `size` vectors; each place of a map becomes the nearest of them.

    Straight through: the gradient of a chosen vector is handed to what it stands for.
    """

    size: int
    width: int

    def setup(self):
        def init(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -1 / self.size, 1 / self.size)

        self.embedding = self.param(
            "embedding", partitioned(init, "VC"), (self.size, self.width)
        )

    def __call__(self, z: Float[Array, "B y x C"]) -> Codes:
        z = z.astype(jnp.float32)
        table = self.embedding
        flat = jax.lax.stop_gradient(z).reshape(-1, self.width)
        square = (table**2).sum(-1)[None]
        ids = jnp.argmin(square - 2 * flat @ table.T, -1).reshape(z.shape[:-1])
        chosen = table[ids]
        return Codes(z + jax.lax.stop_gradient(chosen - z), ids, chosen, z)

    def look_up(self, ids: Int[Array, "B y x"]) -> Float[Array, "B y x C"]:
        """The vectors of ids; an id outside the table gives NaN."""
        ids = jnp.where(ids < 0, self.size, ids)
        return self.embedding.at[ids].get(mode="fill", fill_value=jnp.nan)


class VQAutoencoder(nn.Module):
    """Images `[B, Y, X, C]` to ids of codes `[B, y, x]`, and back: VQ-VAE and VQ-GAN.

    Called, it gives images again and the `Codes` that they went through.
    """

    widths: Sequence[int] = (128, 128, 256, 256, 512)
    depth: int = 2
    channels: int = 3
    latent: int = 256
    codes: int = 1024
    code_width: int | None = None  # None: as the latents.
    groups: int = 32
    looks: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self):
        def mix(width: int) -> Conv:
            return Conv(width, 1, padding=(0, 0), dtype=self.dtype)

        how = (self.groups, self.looks, self.dtype)
        width = self.code_width or self.latent
        self.encoder = Encoder(self.widths, self.depth, self.latent, *how)
        self.decoder = Decoder(self.widths, self.depth, self.channels, *how)
        self.encoded, self.decoded = mix(width), mix(self.latent)
        self.codebook = Codebook(self.codes, width)

    def __call__(
        self, images: Float[Array, "B Y X C"]
    ) -> tuple[Float[Array, "B Y X C"], Codes]:
        codes = self.quantize(images)
        return self._decode(codes.vectors), codes

    def quantize(self, images: Float[Array, "B Y X C"]) -> Codes:
        """The codes of images."""
        if images.shape[-1] != self.channels:
            raise ValueError(
                f"images have {images.shape[-1]} channels; the model takes {self.channels}"
            )
        return self.codebook(self.encoded(self.encoder(images)))

    def encode(self, images: Float[Array, "B Y X C"]) -> Int[Array, "B y x"]:
        """The ids of the codes of images."""
        return self.quantize(images).ids

    def decode(self, ids: Int[Array, "B y x"]) -> Float[Array, "B Y X C"]:
        """Images of ids."""
        return self._decode(self.codebook.look_up(ids))

    def _decode(self, z: Array) -> Array:
        return self.decoder(self.decoded(z)).astype(jnp.float32)


class Judged(nn.Module):
    """An autoencoder beside the critic that it is trained against."""

    autoencoder: nn.Module
    critic: nn.Module

    def __call__(self, images: Float[Array, "B Y X C"], *inputs) -> tuple[Any, Any]:
        found = self.autoencoder(images, *inputs)
        if self.is_initializing():
            self.critic(images)
        return found

    def judge(self, images: Float[Array, "B Y X C"]) -> Float[Array, "B y x"]:
        """What the critic says of images."""
        return self.critic(images)


class Critic(nn.Module):
    """Images to a number for each of many patches that overlap: higher, the more real.

    Isola's PatchGAN with group norms, which need no statistics of other images.
    """

    width: int = 64
    depth: int = 3
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B Y X C"]) -> Float[Array, "B y x"]:
        x = images
        for i in range(self.depth + 1):
            width, stride = self.width * min(2**i, 8), 2 if i < self.depth else 1
            x = Conv(width, 4, stride, (1, 1), self.dtype, name=f"down_{i}")(x)
            if i:
                x = GroupNorm(self.groups, name=f"norm_{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        x = Conv(1, 4, 1, (1, 1), self.dtype, name="end")(x)
        return x[..., 0].astype(jnp.float32)


def flops(model: KLAutoencoder | VQAutoencoder, shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one image there and back: 2 for each multiply-add.

    Counts convolutions, distances to codes and the attention in the middle. A training step
    costs three times as much.
    """
    Y, X, C = shape
    widths, latent = list(model.widths), model.latent
    out = 2 * latent if isinstance(model, KLAutoencoder) else latent
    top = widths[-1]
    area = [Y * X // 4**i for i in range(len(widths))]
    middle = area[-1] * 4 * 9 * top**2
    middle += area[-1] * (4 * top**2 + 2 * area[-1] * top) if model.looks else 0
    total = 2 * middle + area[0] * 9 * 2 * C * widths[0] + area[-1] * 9 * (out + latent) * top
    if isinstance(model, VQAutoencoder):
        width = model.code_width or latent
        total += area[-1] * width * (2 * latent + model.codes)
    elif model.mixes:
        total += area[-1] * (out**2 + latent**2)
    for sizes, areas, depth in (
        (widths, area, model.depth),
        (widths[::-1], area[::-1], model.depth + 1),
    ):
        before = sizes[0]
        for i, (width, places) in enumerate(zip(sizes, areas, strict=True)):
            for _ in range(depth):
                total += places * (9 * before + 9 * width) * width
                total += places * before * width if before != width else 0
                before = width
            if i + 1 < len(sizes):  # At the size that it leads to.
                total += areas[i + 1] * 9 * width**2
    return 2 * total
