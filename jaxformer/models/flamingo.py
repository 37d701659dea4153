"""Language models that look at images beside the text, by gated cross-attention.

Sources: Flamingo (Alayrac et al. 2022, arXiv 2204.14198), whose text sees the image before
it; Llama 3.2 Vision. `layers.gated` has the layers, `layers.connect` the resampler.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Stack
from jaxformer.layers.gated import GatedBlock, Sighted
from jaxformer.models import decoder, vit
from jaxformer.models.decoder import Decoder, LanguageModel, places
from jaxformer.models.vlm import VLM, check, looks
from jaxformer.ops.mask import Segments


class Flamingo(VLM):
    """A `VLM` whose text has one token `image` for each image, and looks at its features.

    A token sees the last image before it in its segment, or else the last of the row's
    first `shared` tokens; what stands before any sees none. `language` has `Sighted` layers,
    such as `gated` makes; without images it is the language model alone.

    `features` are what `encode` gave, in the place of images, and `seen` the number of the
    image, from 1, that each token sees: how a cache goes on after the prompt, see `prompted`.
    """

    def prompted(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], **given: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `VLM`: what follows sees the last image of the prompt."""
        features = self.encode(given["images"])
        rest = {name: x for name, x in given.items() if name != "images"}
        seen = latest(tokens == self.image)
        seen = jnp.take_along_axis(seen, lengths[:, None] - 1, 1)
        return rest | {"features": features}, {"features": features, "seen": seen}

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        images: Float[Array, "B n ..."] | None = None,
        shared: Int[Array, " B"] | None = None,
        *,
        features: Float[Array, "B n s D"] | None = None,
        seen: Int[Array, "B T"] | None = None,
        prefix: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        fresh: bool = False,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """What the logits are made of; further inputs as of `VLM`."""
        x = self.language.embed(tokens)
        how = looks(tokens, segments, prefix, shared)
        if positions is not None:
            how["positions"] = positions
        if images is not None:
            features = self.encode(images, train)
        if features is not None:
            B, n, s, _ = features.shape
            if seen is None:
                check(tokens, self.image, n, 1)
                seen = latest(tokens == self.image, segments, shared)
            # A count that does not fit is not trained on in silence.
            x = jnp.where((seen <= n)[..., None], x, jnp.nan)
            numbers = jnp.broadcast_to(jnp.repeat(1 + jnp.arange(n), s)[None], (B, n * s))
            how["context"] = features.reshape(B, n * s, -1)
            how["context_mask"] = Segments(seen, numbers)
        return self.language.run(x, fresh=fresh, train=train, **how)


def latest(
    here: Bool[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    shared: Int[Array, " B"] | None = None,
) -> Int[Array, "B T"]:
    """The number, from 1, of the image that each token sees; 0 for none.

    >>> latest(jnp.array([[False, True, False, True, False]])).tolist()
    [[0, 1, 1, 2, 2]]
    """
    number = jnp.cumsum(here, 1)
    index = jnp.arange(here.shape[1])[None]
    begin = jnp.zeros_like(number)
    if segments is not None:
        start = index - places(segments)
        begin = jnp.take_along_axis(number - here, start, 1)
    own = number > begin
    if shared is None:
        return jnp.where(own, number, 0)
    common = (here & (index < shared[:, None])).sum(1, keepdims=True)
    return jnp.where(own, number, jnp.where(index < shared[:, None], 0, common))


def gated(model: Decoder, every: int = 1, **attention: Any) -> LanguageModel:
    """A decoder's parts with a gated block before each `every` of its layers.

    `attention` are options of the attention to images, whose heads are as the text's.

    Raises:
      ValueError: layers of several kinds, or a depth that `every` does not divide.
    """
    parts = model.parts()
    stack: Any = parts.stack
    if len(model.windows) > 1 or every < 1 or model.depth % every:
        raise ValueError(
            f"every={every} must divide depth={model.depth}, and layers be of one kind"
        )
    own = stack.block
    cross = Attention(
        own.attention.num_heads,
        own.attention.head_dim,
        own.attention.num_kv_heads,
        **{"dtype": model.dtype, **attention},
    )
    block = GatedBlock(cross, own.mlp.clone(), own.norm, own.epsilon, dropout=own.dropout)
    # A module that stands in two places would be one with the same parameters.
    layers = (
        own.clone(attention=own.attention.clone(), mlp=own.mlp.clone()) for _ in range(every)
    )
    chain = Sighted((block, *layers))
    unroll = max(1, stack.unroll // every)
    made = Stack(chain, model.depth // every, stack.remat, unroll, stack.drop_path)
    return parts.clone(stack=made)


def flops(
    model: Flamingo,
    text: Sequence[int],
    images: Sequence[int],
    *rest: Any,
    own: Decoder,
    keys: int,
) -> int:
    """Floating-point operations of one row forward, as `vlm.flops` counts them.

    Args:
      model: what `gated(own)` was made for, with a `vit.ViT`.
      text: (T,)
      images: (n, Y, X, C)
      *rest: counts for nothing.
      own: the decoder without its gated layers.
      keys: features of an image.
    """
    (T,), (count, Y, X, C) = text, images
    D, N = own.width, own.num_heads
    H, K = own.head_dim or D // N, own.num_kv_heads or N
    S, mlp = count * keys, D * own.mlp_dim * (3 if own.gated else 2)
    layer = 2 * T * D * N * H + 2 * S * D * K * H + 2 * T * S * N * H + T * mlp
    layers = model.language.stack.depth * layer
    seen = count * vit.flops(model.vision.clone(num_classes=0), (Y, X, C))
    return seen + decoder.flops(own, (T,)) + 2 * layers
