"""InternVL of transformers: `InternVLForConditionalGeneration`, and its tower.

Source: InternVL3, Zhu et al. 2025, arXiv 2504.10479. Images are tiles of one size there: each
tile is an image here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxformer.convert import language, llama, parts, towers
from jaxformer.convert.config import activation_of, name_of, number, pair
from jaxformer.convert.engine import Entry, Family
from jaxformer.convert.vlm import PROJECTOR, Kind
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Chain, Mlp, Stack
from jaxformer.layers.connect import Merge, Project
from jaxformer.layers.embed import GridPosition, PatchEmbed
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import Average, First
from jaxformer.models.vit import Encoder

_NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "projection_layer"}
_EPSILON = 1e-5  # of the projector's norm.


def _vision(config: dict[str, Any], names: set[str], dtype: Any) -> Encoder:
    known = {"norm_type": "layer_norm", "use_qk_norm": False, "use_mask_token": False}
    language.refuse(config, **known, use_absolute_position_embeddings=True)
    D, N = number(config, "hidden_size", 1024), number(config, "num_attention_heads", 16)
    patch, other = pair(config, "patch_size", 14)
    rows, columns = pair(config, "image_size", 448)
    if D % N or patch != other or rows % patch or columns % patch:
        raise InputError(
            f"config.json: num_attention_heads={N} must divide hidden_size={D}, and patches be "
            f"squares that divide image_size={[rows, columns]}"
        )
    bias = bool(config.get("attention_bias", False))
    width = number(config, "intermediate_size", 4096)
    epsilon = number(config, "layer_norm_eps", 1e-6)
    block = Block(
        Attention(N, D // N, use_bias=bias, out_bias=True, dtype=dtype),
        Mlp(width, activation_of(config, "hidden_act", "gelu"), use_bias=True, dtype=dtype),
        epsilon=epsilon,
        layer_scale=number(config, "layer_scale_init_value", 0.1),
    )
    mean = bool(config.get("use_mean_pooling", True))
    embed = PatchEmbed(
        patch,
        D,
        GridPosition(D, (rows // patch, columns // patch), prefix=1),
        prefix=1,
        channels=number(config, "num_channels", 3),
        dtype=dtype,
    )
    stack = Stack(block, number(config, "num_hidden_layers", 24))
    norm, pool = (None, Average(1)) if mean else (LayerNorm(epsilon), First())
    return Encoder(embed, stack, norm, pool, dtype=dtype)


def _config(model: Any) -> dict[str, Any] | None:
    if not towers.is_tower(model, PatchEmbed) or model.embed.prefix != 1:
        return None
    block, embed = model.stack.block, model.embed
    position: Any = embed.position
    if position is None or position.shape is None or block.layer_scale is None:
        return None
    return {
        "model_type": "internvl_vision",
        **towers.config_of(model),
        "attention_bias": block.attention.use_bias,
        "image_size": [n * embed.patch for n in position.shape],
        "patch_size": [embed.patch] * 2,
        "num_channels": embed.channels,
        "layer_scale_init_value": block.layer_scale,
        "use_mean_pooling": model.norm is None,
    }


def _entries(model: Any) -> list[Entry]:
    block, layer = "stack/block", "encoder.layer.{}"
    attention = model.stack.block.attention
    embed = "embeddings.patch_embeddings.projection"
    found = [
        Entry("embed/cls/embedding", "embeddings.cls_token", "() T D -> T D"),
        Entry("embed/position/embedding", "embeddings.position_embeddings", "() T D -> T D"),
        *parts.patches("embed/patch", embed, model.embed.patch),
        *parts.attention(
            f"{block}/attention",
            f"{layer}.attention",
            _NAMES,
            attention.num_heads,
            without=() if attention.use_bias else ("query", "key", "value"),
        ),
        *parts.norm(f"{block}/attention_norm", f"{layer}.layernorm_before"),
        *parts.norm(f"{block}/mlp_norm", f"{layer}.layernorm_after"),
        *parts.linear(f"{block}/mlp/up", f"{layer}.mlp.fc1"),
        *parts.linear(f"{block}/mlp/down", f"{layer}.mlp.fc2"),
        *parts.layer_scale(f"{block}/attention_scale", f"{layer}.lambda_1"),
        *parts.layer_scale(f"{block}/mlp_scale", f"{layer}.lambda_2"),
    ]
    return found + ([] if model.norm is None else parts.norm("norm", "layernorm"))


TOWER = Family(
    name="internvl_vision",
    model=_vision,
    config=_config,
    entries=_entries,
    inputs=towers.inputs,
)


class _InternVL(Kind):
    """Pixel shuffle, a norm and an MLP; the class token is left out."""

    def text(self, config: Mapping[str, Any]):
        family, told = super().text(config)
        return family, told | {"tie_word_embeddings": config.get("tie_word_embeddings", True)}

    def knows(self, connector):
        kinds = [type(part) for part in getattr(connector, "parts", ())]
        return kinds == [Merge, LayerNorm, Project]

    def join(self, config, tower, width, dtype):
        known = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
        language.refuse(config, **known)
        ratio = number(config, "downsample_ratio", 0.5)
        side = round(1 / ratio)
        if side * ratio != 1:
            raise InputError(
                f"config.json: downsample_ratio={ratio} must be 1 / a whole number"
            )
        activation = activation_of(config, "projector_hidden_act", "gelu")
        mlp = Project(width, width, activation, dtype=dtype)
        return tower, Chain((Merge(side), LayerNorm(_EPSILON), mlp)), 1

    def tower_of(self, model):
        return model.vision

    def told(self, model):
        merge, _, mlp = model.connector.parts
        if model.skip != 1 or not towers.is_tower(model.vision, PatchEmbed):
            return None
        position: Any = model.vision.embed.position
        rows, columns = position.shape
        return {
            "image_token_id": model.image,
            "downsample_ratio": 1 / merge.side,
            "projector_hidden_act": name_of(mlp.activation),
            "image_seq_length": rows * columns // merge.side**2,
        }

    def projector(self, connector):
        return [
            *parts.norm("connector/parts_1", f"{PROJECTOR}layer_norm"),
            *parts.linear("connector/parts_2/up", f"{PROJECTOR}linear_1"),
            *parts.linear("connector/parts_2/down", f"{PROJECTOR}linear_2"),
        ]

    def family(self):
        made = super().family()
        rename = tuple(rule for rule in made.rename if "vision_model" not in rule[1])
        return dataclasses.replace(made, rename=rename)


INTERNVL = _InternVL(
    "internvl",
    "InternVLForConditionalGeneration",
    TOWER,
    (llama.QWEN2, llama.LLAMA, llama.QWEN3),
    image=151667,
).family()
