"""SigLIP 2 of any resolution (NaFlex) of transformers: `Siglip2Model`, and its towers alone.

SigLIP 2 of fixed resolution says `siglip` in its config, and is there. Their
`pixel_values` and `spatial_shapes` are our patches and grids, the latter with an axis for
the images of a row; their `pixel_attention_mask` follows from those.
"""

import math
from typing import Any

import flax.linen as nn

from jaxformer.convert import parts, siglip, towers
from jaxformer.convert.config import number
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.layers.pack import (
    PackedAttentionPool,
    PackedAverage,
    PackedEmbed,
    PackedPosition,
)
from jaxformer.models.clip import TwoTowers
from jaxformer.models.vit import Encoder


def _vision(config: dict[str, Any], dtype: Any) -> Encoder:
    D, count = number(config, "hidden_size", 768), number(config, "num_patches", 256)
    side = math.isqrt(count)
    if side**2 != count:
        raise InputError(f"config.json: num_patches={count} must be the square of a number")
    embed = PackedEmbed(
        number(config, "patch_size", 16),
        D,
        PackedPosition(D, (side, side)),
        channels=number(config, "num_channels", 3),
        dtype=dtype,
    )
    return siglip.encoder(config, dtype, embed, PackedAttentionPool, PackedAverage)


def _both(config: dict[str, Any], names: set[str], dtype: Any) -> TwoTowers:
    images, texts = towers.towers_of(config)
    return TwoTowers(_vision(images, dtype), siglip.text(texts, dtype), math.log(10), -10.0)


def _vision_config(model: Any) -> dict[str, Any] | None:
    if not towers.is_tower(model, PackedEmbed):
        return None
    embed = model.embed
    position: nn.Module | None = embed.position
    if not isinstance(position, PackedPosition):
        return None
    return {
        "model_type": "siglip2_vision_model",
        **towers.config_of(model),
        "num_patches": math.prod(position.shape),
        "patch_size": embed.patch,
        "num_channels": embed.channels,
        "vision_use_head": isinstance(model.pool, PackedAttentionPool),
    }


def _text_config(model: Any) -> dict[str, Any] | None:
    return siglip.text_config("siglip2", model)


def _both_config(model: Any) -> dict[str, Any] | None:
    if not isinstance(model, TwoTowers) or model.bias is None:
        return None
    images, texts = _vision_config(model.vision), _text_config(model.text)
    if images is None or texts is None:
        return None
    return {
        "architectures": ["Siglip2Model"],
        "model_type": "siglip2",
        "vision_config": images,
        "text_config": texts,
    }


def _vision_entries(ours: str, tower: Encoder) -> list[Entry]:
    theirs, embed = "vision_model.embeddings", f"{ours}embed"
    table = f"{theirs}.position_embedding.weight"
    return [
        *parts.linear(f"{embed}/patch", f"{theirs}.patch_embedding"),
        Entry(f"{embed}/position/embedding", table, "T D -> T D"),
        *siglip.vision_entries(ours, tower),
    ]


def _both_entries(model: Any) -> list[Entry]:
    return [
        *_vision_entries("vision/", model.vision),
        *siglip.text_entries("text/", model.text),
        *siglip.logits_entries(),
    ]


SIGLIP2 = Family(
    name="siglip2",
    model=_both,
    config=_both_config,
    entries=_both_entries,
    inputs=towers.inputs,
    ignore=towers.IGNORE,
)
SIGLIP2_VISION = siglip.alone(
    "siglip2_vision_model",
    "vision_model",
    _vision,
    siglip.named("Siglip2VisionModel", _vision_config),
    _vision_entries,
)
SIGLIP2_TEXT = siglip.alone(
    "siglip2_text_model",
    "text_model",
    siglip.text,
    siglip.named("Siglip2TextModel", _text_config),
    siglip.text_entries,
)
