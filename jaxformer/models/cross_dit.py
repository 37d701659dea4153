"""DiT that looks at a text by cross-attention: latent diffusion, told in words.

Rombach et al. 2022 (arXiv 2112.10752) condition a U-Net so; PixArt (Chen et al. 2023,
2310.00426) a DiT. Latents are those of `models.vae`, or pixels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.attention import Attention
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.text import TokenEmbed
from jaxformer.layers.timestep import AdaBlock, AdaCrossBlock, TimestepEmbed
from jaxformer.models import dit
from jaxformer.models.dit import Denoiser, DiT, Given
from jaxformer.ops.mask import Segments


class TextTold(nn.Module):
    """A time as the condition, and ids of letters or tokens, with places, as the context."""

    width: int
    vocab: int
    length: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, t: Float[Array, " B"], text: Int[Array, "B S"], *, train: bool = False
    ) -> Given:
        del train
        time = TimestepEmbed(self.width, dtype=self.dtype, name="time")(t)
        embed = TokenEmbed(self.vocab, self.width, self.length, dtype=self.dtype, name="text")
        return Given(time[:, None], embed(text).x)


class CrossDenoiser(Denoiser):
    """A `Denoiser` whose blocks look at the context, and have none of it among their tokens.

    In training nothing of a row's text is real with the chance `dropout`, drawn from the
    random stream "dropout".
    """

    dropout: float = 0.0

    def _run(self, x, t, label, train):
        text, real = label
        if train and self.dropout:
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.dropout, t.shape)
            real = jnp.broadcast_to(kept[:, None], text.shape) & (
                True if real is None else real
            )
        condition, context = self.condition(t, text, train=train)
        x, inputs, _ = self.embed(x, train=train)
        inputs = {**inputs, "train": train, "condition": condition, "context": context}
        if real is not None:
            queries = jnp.ones(x.shape[:2], jnp.int32)
            inputs["context_mask"] = Segments(queries, real.astype(jnp.int32))
        return self.stack(x, **inputs), condition, x


class CrossDiT(DiT):
    """A `DiT` that is told a text in the place of a class: `model(x, t, text, real)`.

    `text` `[B, S]` are ids of `vocab` letters or tokens, `length` at most, of which `real`
    says what is none of padding; where nothing is real it is told no text. That is so in
    training with the chance `label_dropout`, so that it can be guided. It learns by
    `objectives.flow_text.TextFlow`, and starts as nothing, as every DiT.
    """

    vocab: int = 40
    length: int = 77

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Array, "B Y X C"],
        t: Float[Array, " B"],
        text: Int[Array, "B S"],
        real: Bool[Array, "B S"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B Y X O"]:
        return self.denoiser.with_early(x, t, (text, real), train=train)[0]

    def parts(self) -> CrossDenoiser:
        """Its parts.

        Raises:
          ValueError: fields that tell of classes.
        """
        if self.context or not self.adaptive:
            raise ValueError("a text is no token of the image: leave context=0, adaptive=True")
        whole = super().parts()
        told = TextTold(self.width, self.vocab, self.length, self.dtype, parent=None)
        return CrossDenoiser(
            whole.embed,
            told,
            whole.stack,
            whole.norm,
            whole.channels,
            dropout=self.label_dropout,
            dtype=self.dtype,
            parent=None,
        )

    def _block(self) -> AdaCrossBlock:
        plain = super()._block()
        assert isinstance(plain, AdaBlock)
        cross = Attention(
            self.num_heads,
            self.width // self.num_heads,
            qk_norm=RMSNorm if self.qk_norm else None,
            use_bias=True,
            dtype=self.dtype,
            parent=None,
        )
        how = plain.attention, plain.mlp, plain.norm, plain.epsilon
        return AdaCrossBlock(*how, cross=cross, parent=None)


def flops(model: CrossDiT, shape: tuple[int, int, int], text: int) -> int:
    """Floating-point operations of one image and `text` tokens forward: 2 a multiply-add."""
    D, T = model.width, (shape[0] // model.patch) * (shape[1] // model.patch)
    layer = 2 * T * D * D + 2 * text * D * D + 2 * T * text * D + 3 * D * D
    return dit.flops(model, shape) + 2 * model.depth * layer
