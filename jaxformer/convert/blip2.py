"""BLIP-2 of transformers: `Blip2ForConditionalGeneration` with OPT.

A tower of fused queries, keys and values, the Q-Former in BERT's layout, and a language
model whose tokens `image_token_index` the queries take the place of.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.convert import language, opt, parts, towers
from jaxformer.convert.config import activation_of, name_of, number, part
from jaxformer.convert.engine import Entry, Family
from jaxformer.convert.files import Stored
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Mlp, Stack
from jaxformer.layers.connect import Project
from jaxformer.layers.embed import PatchEmbed
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import First
from jaxformer.models.qformer import QFormer, QueryBlock
from jaxformer.models.vit import Encoder, Size
from jaxformer.models.vlm import VLM

_TEXT, _VISION, _FORMER = "language_model.", "vision_model.", "qformer."
_TOWER, _BERT = Size(1408, 39, 6144, 16), Size(768, 12, 3072, 12)  # What configs leave out.
_SELF, _CROSS = "attention", "crossattention"
_NAMES = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "out": "output.dense",
}


def _model(config: dict[str, Any], names: set[str], dtype: Any) -> VLM:
    told = part(config, "text_config")
    kind = told.get("model_type", "opt")
    if kind != "opt":
        raise InputError(
            f"config.json: text_config has model_type={kind!r}; BLIP-2 is known with opt"
        )
    inner = {name.removeprefix(_TEXT) for name in names if name.startswith(_TEXT)}
    text: Any = opt.OPT.model(told, inner, dtype)
    image = config.get("image_token_index", config.get("image_token_id"))
    if isinstance(image, bool) or not isinstance(image, int) or image < 0:
        raise InputError(
            f"config.json: image_token_index={image!r} must be the id of the token in whose "
            "places the queries stand; write it there"
        )
    former = _former(config, text.table.width, dtype)
    return VLM(_tower(part(config, "vision_config"), dtype), former, text, image)


def _tower(config: dict[str, Any], dtype: Any) -> Encoder:
    epsilon = number(config, "layer_norm_eps", 1e-6)
    biased = bool(config.get("qkv_bias", True))
    plain = towers.stack(config, _TOWER, "gelu", epsilon, dtype)
    own: Any = plain.block
    attention = own.attention.clone(use_bias=biased, out_bias=None if biased else True)
    embed = towers.patch_embed(config, _TOWER, 14, 1, dtype)
    stack = Stack(own.clone(attention=attention, mlp=own.mlp.clone()), plain.depth)
    return Encoder(embed, stack, LayerNorm(epsilon), First(), dtype=dtype)


def _former(config: dict[str, Any], width: int, dtype: Any) -> QFormer:
    told = part(config, "qformer_config")
    language.refuse(told, use_qformer_text_input=False)
    D, N = (
        number(told, "hidden_size", _BERT.width),
        number(told, "num_attention_heads", _BERT.num_heads),
    )
    depth = number(told, "num_hidden_layers", _BERT.depth)
    every = number(told, "cross_attention_frequency", 2)
    if D % N:
        raise InputError(
            f"config.json: qformer_config has num_attention_heads={N}, which must divide "
            f"hidden_size={D}"
        )
    epsilon = number(told, "layer_norm_eps", 1e-12)

    def attention() -> Attention:
        return Attention(N, D // N, use_bias=True, dtype=dtype)

    def block(at: int) -> QueryBlock:
        F = number(told, "intermediate_size", _BERT.mlp_dim)
        return QueryBlock(
            attention(),
            Mlp(F, activation_of(told, "hidden_act", "gelu"), use_bias=True, dtype=dtype),
            LayerNorm,
            epsilon,
            cross=None if at % every else attention(),
        )

    stack = language.arrange([block(i) for i in range(depth)])
    out = Project(width, dtype=dtype)
    count = number(config, "num_query_tokens", 32)
    return QFormer(count, D, stack, out, epsilon=epsilon, dtype=dtype)


def _config(model: Any) -> dict[str, Any] | None:
    if type(model) is not VLM or type(model.connector) is not QFormer or model.skip:
        return None
    text = opt.OPT.config(model.language)
    if text is None or not towers.is_tower(model.vision, PatchEmbed):
        return None
    tower, image = model.vision, towers.image_config(model.vision.embed)
    former = _told_former(model.connector)
    if image is None or former is None or image.pop("num_channels") != 3:
        return None
    attention = tower.stack.block.attention
    vision = {"qkv_bias": attention.use_bias, **towers.config_of(tower), **image}
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "num_query_tokens": model.connector.count,
        "image_token_index": model.image,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": {"model_type": "blip_2_vision_model", **vision},
        "qformer_config": {**former, "encoder_hidden_size": tower.embed.width},
        "text_config": text,
    }


def _told_former(former: QFormer) -> dict[str, Any] | None:
    blocks = [layer.block for layer in language.layers_of(former.stack)]
    if not all(type(block) is QueryBlock for block in blocks) or former.text is not None:
        return None
    sees = [i for i, block in enumerate(blocks) if block.cross is not None]
    block: Any = blocks[0]
    return {
        "model_type": "blip_2_qformer",
        "hidden_size": former.width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": block.attention.num_heads,
        "intermediate_size": block.mlp.width,
        "hidden_act": name_of(block.mlp.activation),
        "layer_norm_eps": block.epsilon,
        "cross_attention_frequency": sees[1] if len(sees) > 1 else len(blocks),
    }


def _entries(model: Any) -> list[Entry]:
    texts = (
        dataclasses.replace(e, ours=f"language/{e.ours}", theirs=f"{_TEXT}{e.theirs}")
        for e in opt.OPT.entries(model.language)
    )
    return [*_images(model.vision), *_queries(model.connector), *texts]


def _images(tower: Any) -> list[Entry]:
    embed, ours, theirs = tower.embed, "vision/embed", f"{_VISION}embeddings"
    block, layer = "vision/stack/block", f"{_VISION}encoder.layers.{{}}"
    attention = tower.stack.block.attention
    without = () if attention.use_bias else ("query", "key", "value")
    return [
        *parts.patches(f"{ours}/patch", f"{theirs}.patch_embedding", embed.patch),
        Entry(f"{ours}/cls/embedding", f"{theirs}.class_embedding", "() () D -> D", at=0),
        Entry(f"{ours}/position/embedding", f"{theirs}.position_embedding", "() T D -> T D"),
        *parts.fused_attention(
            f"{block}/attention",
            f"{layer}.self_attn.qkv",
            f"{layer}.self_attn.projection",
            attention.num_heads,
            without=without,
        ),
        *parts.norm(f"{block}/attention_norm", f"{layer}.layer_norm1"),
        *parts.norm(f"{block}/mlp_norm", f"{layer}.layer_norm2"),
        *parts.linear(f"{block}/mlp/up", f"{layer}.mlp.fc1"),
        *parts.linear(f"{block}/mlp/down", f"{layer}.mlp.fc2"),
        *parts.norm("vision/norm", f"{_VISION}post_layernorm"),
    ]


def _queries(former: QFormer) -> list[Entry]:
    found = [
        Entry("connector/queries/embedding", "query_tokens", "() T D -> T D"),
        *parts.norm("connector/norm", f"{_FORMER}layernorm"),
        *parts.linear("connector/out/out", "language_projection"),
    ]
    for where, theirs, block, entry in language.places(former.stack, f"{_FORMER}encoder.layer"):
        path = f"connector/{where}"
        heads = {"attention": (_SELF, block.attention)}
        if block.cross is not None:
            heads["cross"] = (_CROSS, block.cross)
        for name, (tensor, attention) in heads.items():
            ours, tensor = f"{path}/{name}", f"{theirs}.{tensor}"
            N = attention.num_heads
            found += parts.attention(ours, tensor, _NAMES, N, **entry)
            found += parts.norm(f"{ours}_norm", f"{tensor}.output.LayerNorm", **entry)
        found += [
            *parts.linear(f"{path}/mlp/up", f"{theirs}.intermediate_query.dense", **entry),
            *parts.linear(f"{path}/mlp/down", f"{theirs}.output_query.dense", **entry),
            *parts.norm(f"{path}/mlp_norm", f"{theirs}.output_query.LayerNorm", **entry),
        ]
    return found


def _inputs(model: Any) -> list[jax.ShapeDtypeStruct]:
    (image,) = towers.inputs(model.vision)
    images = jax.ShapeDtypeStruct((1, *image.shape), image.dtype)
    return [jax.ShapeDtypeStruct((1, 1), jnp.int32), images]


def _unpack(config: Mapping[str, Any], tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Without a head that is tied."""
    inner = {n.removeprefix(_TEXT): x for n, x in tensors.items() if n.startswith(_TEXT)}
    kept = opt.OPT.unpack(part(config, "text_config"), inner)
    rest = {n: x for n, x in tensors.items() if not n.startswith(_TEXT)}
    return rest | {f"{_TEXT}{name}": x for name, x in kept.items()}


BLIP2 = Family(
    name="blip-2",
    model=_model,
    config=_config,
    entries=_entries,
    inputs=_inputs,
    ignore=towers.IGNORE,
    unpack=_unpack,
)
