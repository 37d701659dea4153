"""SigLIP of transformers, and SigLIP 2 of fixed resolution, which has the same files.

`SiglipModel`, and its towers alone: `SiglipVisionModel` and `SiglipTextModel`. A tower of
images without its head (`vision_use_head` false) gives the mean of its tokens, as
`SiglipForImageClassification` takes it.
"""

import math
from typing import Any

import flax.linen as nn

from jaxformer.convert import parts, towers
from jaxformer.convert.config import number
from jaxformer.convert.engine import Entry, Family
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import PatchEmbed
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import AttentionPool, Average
from jaxformer.layers.text import Last, TokenEmbed
from jaxformer.models.clip import TwoTowers
from jaxformer.models.vit import SIZES, Encoder

_SIZES, _ACT = SIZES["B"], "gelu_pytorch_tanh"  # What a config leaves out.


def _vision(config: dict[str, Any], dtype: Any) -> Encoder:
    embed = towers.patch_embed(config, _SIZES, 16, 0, dtype)
    return encoder(config, dtype, embed, AttentionPool, Average)


def encoder(config: dict[str, Any], dtype: Any, embed: nn.Module, head, headless) -> Encoder:
    """The tower of images, with the pooling of its head or that of a tower without."""
    epsilon = number(config, "layer_norm_eps", 1e-6)
    pool = headless()
    if config.get("vision_use_head", True):
        pool = head(
            towers.attention(config, _SIZES, dtype),
            towers.mlp(config, _SIZES, _ACT, dtype),
            epsilon,
        )
    stack = towers.stack(config, _SIZES, _ACT, epsilon, dtype)
    return Encoder(embed, stack, LayerNorm(epsilon), pool, dtype=dtype)


def text(config: dict[str, Any], dtype: Any) -> Encoder:
    """The tower of texts."""
    D, epsilon = number(config, "hidden_size", 768), number(config, "layer_norm_eps", 1e-6)
    vocab = number(config, "vocab_size", 32000)
    length = number(config, "max_position_embeddings", 64)
    return Encoder(
        TokenEmbed(vocab, D, length, dtype=dtype),
        towers.stack(config, _SIZES, _ACT, epsilon, dtype),
        LayerNorm(epsilon),
        Last(),
        Einsum("BD,DP->BP", {"P": number(config, "projection_size", D)}, True, dtype),
        dtype=dtype,
    )


def _both(config: dict[str, Any], names: set[str], dtype: Any) -> TwoTowers:
    images, texts = towers.towers_of(config)
    return TwoTowers(_vision(images, dtype), text(texts, dtype), math.log(10), -10.0)


def _vision_config(model: Any) -> dict[str, Any] | None:
    if not towers.is_tower(model, PatchEmbed) or model.embed.prefix:
        return None
    image = towers.image_config(model.embed)
    if image is None:
        return None
    return {
        "model_type": "siglip_vision_model",
        **towers.config_of(model),
        **image,
        "vision_use_head": isinstance(model.pool, AttentionPool),
    }


def text_config(kind: str, model: Any) -> dict[str, Any] | None:
    """What a config of `kind` says of the tower of texts, or None."""
    if not towers.is_tower(model, TokenEmbed) or not isinstance(model.neck, Einsum):
        return None
    return {
        "model_type": f"{kind}_text_model",
        **towers.config_of(model),
        "vocab_size": model.embed.vocab,
        "max_position_embeddings": model.embed.length,
        "projection_size": model.neck.sizes["P"],
    }


def _both_config(model: Any) -> dict[str, Any] | None:
    if not isinstance(model, TwoTowers) or model.bias is None:
        return None
    images, texts = _vision_config(model.vision), text_config("siglip", model.text)
    if images is None or texts is None:
        return None
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": images,
        "text_config": texts,
    }


def named(name: str, config):
    """A config with the name of their class."""

    def found(model: Any) -> dict[str, Any] | None:
        told = config(model)
        return told and {"architectures": [name], **told}

    return found


def vision_entries(ours: str, tower: Encoder) -> list[Entry]:
    """The tower of images, after its embeddings."""
    theirs, head = "vision_model", "vision_model.head"
    found = [
        *towers.layers(ours, theirs, tower),
        *parts.norm(f"{ours}norm", f"{theirs}.post_layernorm"),
    ]
    if hasattr(tower.pool, "attention"):
        heads, pool = tower.pool.attention.num_heads, f"{ours}pool"
        found += [
            Entry(f"{pool}/probe/embedding", f"{head}.probe", "() T D -> T D"),
            *parts.fused_attention(
                f"{pool}/attention",
                f"{head}.attention.in_proj_",
                f"{head}.attention.out_proj",
                heads,
            ),
            *parts.norm(f"{pool}/norm", f"{head}.layernorm"),
            *parts.linear(f"{pool}/mlp/up", f"{head}.mlp.fc1"),
            *parts.linear(f"{pool}/mlp/down", f"{head}.mlp.fc2"),
        ]
    return found


def _vision_entries(ours: str, tower: Encoder) -> list[Entry]:
    return [*towers.patches(ours, tower.embed), *vision_entries(ours, tower)]


def text_entries(ours: str, tower: Encoder) -> list[Entry]:
    """The tower of texts."""
    return [*towers.text(ours, tower), *parts.linear(f"{ours}neck", "text_model.head")]


def logits_entries() -> list[Entry]:
    """The scale and the bias, which have an axis of one here."""
    return [Entry(f"logits/{name}", f"logit_{name}", "() ->") for name in ("scale", "bias")]


def _both_entries(model: Any) -> list[Entry]:
    return [
        *_vision_entries("vision/", model.vision),
        *text_entries("text/", model.text),
        *logits_entries(),
    ]


def alone(name: str, prefix: str, model, config, entries) -> Family:
    """The family of a tower that stands alone; files of the hub have a prefix there."""
    return Family(
        name=name,
        model=lambda config, names, dtype: model(config, dtype),
        config=config,
        entries=lambda model: entries("", model),
        inputs=towers.inputs,
        rename=((rf"^(?!{prefix}\.)", f"{prefix}."),),
        ignore=towers.IGNORE,
    )


SIGLIP = Family(
    name="siglip",
    model=_both,
    config=_both_config,
    entries=_both_entries,
    inputs=towers.inputs,
    ignore=towers.IGNORE,
)
SIGLIP_VISION = alone(
    "siglip_vision_model",
    "vision_model",
    _vision,
    named("SiglipVisionModel", _vision_config),
    _vision_entries,
)
SIGLIP_TEXT = alone(
    "siglip_text_model",
    "text_model",
    text,
    named("SiglipTextModel", lambda model: text_config("siglip", model)),
    text_entries,
)
