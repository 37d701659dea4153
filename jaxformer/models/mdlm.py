"""Masked-diffusion language models: the decoder without the causal mask.

`objectives.unmask` trains them and `samplers.unmask` draws from them. Sources: MDLM
(arXiv 2406.07524), LLaDA (2502.09992), Dream (2508.15487).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.models.decoder import Decoder, LanguageModel
from jaxformer.models.decoder_sizes import SIZES as DECODERS
from jaxformer.models.timed import TimedDecoder
from jaxformer.ops.rotary_scaling import Rotary

SIZES = {
    "llada-8b": {
        "vocab": 126464,
        "width": 4096,
        "depth": 32,
        "mlp_dim": 12288,
        "num_heads": 32,
        "length": 4096,
        "rotary": Rotary(5e5),
        "epsilon": 1e-5,
        "tied": False,
        "causal": False,
    },
    # Its logits are of the next token: see `shifted`.
    "dream-7b": {**DECODERS["qwen2.5-7b"], "causal": False},
}
MASK_IDS = {"llada-8b": 126336, "dream-7b": 151666}


def named(name: str, **fields) -> Decoder:
    """A masked-diffusion model by its usual name; other fields as given.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in SIZES:
        raise ValueError(f"{name!r} is no model that unmasks; known are {', '.join(SIZES)}")
    return Decoder(**{**SIZES[name], **fields})


def denoiser(
    model: Decoder | LanguageModel, params, *, shift: bool = False
) -> Callable[[Int[Array, "B T"], Float[Array, " B"]], Float[Array, "B T V"]]:
    """The function that a sampler calls: `(tokens, share masked) -> logits`.

    A `TimedDecoder` is told the share; others go by the masks that they see. With `shift`
    the logits at a token are those that the model gives at the one before it, as Dream's are,
    which was made of a decoder; the first keeps its own.
    """

    def denoise(tokens, share):
        given = {"share": share} if isinstance(model, TimedDecoder) else {}
        logits: Any = model.apply({"params": params}, tokens, **given)
        return shifted(logits) if shift else logits

    return denoise


def shifted(logits: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
    """Each token's logits in the place of the next one's. Source: Dream's code."""
    return jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
