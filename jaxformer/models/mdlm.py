"""Masked-diffusion language models: the decoder without the causal mask.

`objectives.unmask` trains them and `samplers.unmask` draws from them. Sources: MDLM
(arXiv 2406.07524), LLaDA (2502.09992), Dream (2508.15487).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxformer.errors import InputError
from jaxformer.layers import cache as caches
from jaxformer.layers.cache import KV
from jaxformer.lora import plain
from jaxformer.models.decoder import Decoder
from jaxformer.models.decoder import flops as decoder_flops
from jaxformer.models.decoder_sizes import SIZES as DECODERS
from jaxformer.models.timed import TimedDecoder
from jaxformer.ops.mask import Positions
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
    model: nn.Module, params, *, shift: bool = False, block: int | None = None
) -> Callable[[Int[Array, "B T"], Float[Array, " B"]], Float[Array, "B T V"]]:
    """The function that a sampler calls: `(tokens, share masked) -> logits`.

    The model is a `Decoder`, a `LanguageModel`, or a `Lora` of one of them.
    A `TimedDecoder` is told the share; others go by the masks that they see. With `shift`
    the logits at a token are those that the model gives at the one before it, as Dream's are,
    which was made of a decoder; the first keeps its own. With a `block` tokens see their block
    of so many and those before it, as a model of block diffusion does.
    """

    if block is not None:
        _untimed(model)

    def denoise(tokens, share):
        given = {"share": share} if is_timed(model) else {}
        if block is not None:
            at = jnp.arange(tokens.shape[1])[None]
            given["mask"] = Positions(at, at, block=block)
        logits: Any = model.apply({"params": params}, tokens, **given)
        return shifted(logits) if shift else logits

    return denoise


def shifted(logits: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
    """Each token's logits in the place of the next one's. Source: Dream's code."""
    return jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1)


@dataclasses.dataclass(frozen=True)
class Streams:
    """Operations of `decoder.flops` for a text and its noisy double in blocks: `(model, (T,))`.

    Layers see both, the head the noisy half alone. Windows are not looked at.
    """

    block: int

    def __call__(self, model: Decoder, shape: tuple[int, ...]) -> int:
        """Of one text forward."""
        (T,) = shape
        alone = decoder_flops(model.clone(causal=False, windows=(None,)), shape)
        heads = model.num_heads * (model.head_dim or model.width // model.num_heads)
        pair = 4 * model.depth * heads  # one query and one key, in all layers.
        seen = T * (T + self.block)  # by both halves: their own block and those before it.
        return 2 * alone - 2 * T * model.width * model.vocab + pair * (seen - 2 * T * T)


def is_timed(model: Any) -> bool:
    """Whether a model, or that within a `Lora`, is told how much is masked."""
    return isinstance(plain(model), TimedDecoder)


def _untimed(model) -> None:
    if is_timed(model):
        raise InputError(
            "a TimedDecoder is told one share for all tokens, and neither blocks nor caches of "
            "them know theirs; draw from it by samplers.unmask.sample, without a block"
        )


class Canvas(struct.PyTreeNode):
    """What `samplers.blocks` calls: the model on all of a canvas, or on a part and a cache.

    `shift` and `block` are those of `denoiser`. Without a `block` a part sees what is kept
    on both sides of it; with one, what is kept before it.
    """

    model: nn.Module = struct.field(pytree_node=False)
    variables: Mapping[str, Any]  # {"params": params}
    shift: bool = struct.field(pytree_node=False, default=False)
    block: int | None = struct.field(pytree_node=False, default=None)

    def empty(self, rows: int, length: int) -> Any:
        """A cache without a token in it, with a slot for each place."""
        _untimed(self.model)
        return caches.empty(self.model, self.variables, rows, length, spare=length)

    def whole(
        self, tokens: Int[Array, "B T"], read: Int[Array, "B R"]
    ) -> tuple[Float[Array, "B R V"], Any]:
        """Logits at the places `read`, and a cache of all tokens."""
        _untimed(self.model)
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = None if self.block is None else Positions(at, at, block=self.block)
        x, new = self._hidden(self.variables, tokens, at, mask)
        return self._logits(x, (read - self.shift).clip(0)), new

    def part(
        self,
        cache: Any,
        tokens: Int[Array, "B T"],
        first: Int[Array, " B"],
        size: int,
        read: Int[Array, "B R"],
    ) -> tuple[Float[Array, "B R V"], Any]:
        """The same from `size` tokens from `first` on, by what is kept of the rest.

        Logits that are shifted take one token more, that before `first`.
        """
        T = tokens.shape[1]
        before = int(self.shift and size < T)  # No token stands before all of them.
        first = first - before
        at = first[:, None] + jnp.arange(size + before)[None]
        at = jnp.where((at >= 0) & (at < T), at, -1)

        def rest(kv: KV) -> KV:
            return kv.around(at) if self.block is None else kv.until(at)

        seen = {**self.variables, "prefix": caches.each(rest, cache)}
        own, mask = (
            jnp.take_along_axis(tokens, at.clip(0), 1),
            Positions(at, at, block=self.block),
        )
        x, new = self._hidden(seen, own, at, mask)
        logits = self._logits(x, (read - self.shift).clip(0) - first[:, None])
        return logits, caches.each(KV.write, cache, new)

    def _hidden(self, variables, tokens, at, mask) -> tuple[Array, Any]:
        how: Any = {"mask": mask, "fresh": True, "mutable": ["cache"], "method": "hidden"}
        x, new = self.model.apply(variables, tokens, positions=at, **how)
        return x, new["cache"]

    def _logits(self, x: Float[Array, "B T D"], columns: Int[Array, "B R"]) -> Array:
        x = jnp.take_along_axis(x, columns.clip(0, x.shape[1] - 1)[..., None], 1)
        logits: Any = self.model.apply(self.variables, x, method="logits")
        return logits
