"""Idefics of transformers, which is Flamingo: `IdeficsForVisionText2Text`.

Layers behind gates look at images before each `cross_layer_interval`-th layer of a Llama; the
tower is CLIP's, of which all tokens are read before its last norm. Which token stands for an
image is the tokenizer's matter there: ours is written as `image_token_id`.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.convert import clip, language, parts, rotary, towers
from jaxformer.convert.config import number, part
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention, Scores
from jaxformer.layers.block import Block, Chain, Mlp, Stack
from jaxformer.layers.connect import Resampler, ResamplerBlock
from jaxformer.layers.gated import GatedBlock, Sighted
from jaxformer.layers.norm import LayerNorm, RMSNorm
from jaxformer.models.flamingo import Flamingo
from jaxformer.models.vlm import Early
from jaxformer.ops.activation import relu

_TOWER, _CROSS, _LATENTS = (
    "model.",
    "model.gated_cross_attn_layers.{}",
    "model.perceiver_resampler",
)
# What a config of the tower leaves out.
_VISION = {
    "embed_dim": 768,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "gelu",
}
_EPSILON = 1e-5  # of the resampler's norms.
_RESAMPLER = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "output_proj"}


def _model(config: dict[str, Any], names: set[str], dtype: Any) -> Flamingo:
    known = {"additional_vocab_size": 0, "alpha_type": "float"}
    language.refuse(config, **known)
    told = _VISION | part(config, "vision_config")
    told["hidden_size"] = told.pop("embed_dim")
    tower: Any = clip.CLIP_VISION.model(told, set(), dtype)
    vision = Early(dataclasses.replace(tower, norm=None), (tower.norm,))
    image = config.get("image_token_id", 0)
    if isinstance(image, bool) or not isinstance(image, int) or image < 0:
        raise InputError(f"config.json: image_token_id={image!r} must be a token's id")
    return Flamingo(
        vision,
        _connector(config, told["hidden_size"], dtype),
        _text(config, names, dtype),
        image,
    )


def _connector(config: dict[str, Any], width: int, dtype: Any) -> Any:
    if not config.get("use_resampler", False):
        return Chain(())
    told = part(config, "perceiver_config")
    language.refuse(told, qk_layer_norms_perceiver=False)
    heads, size = (
        number(told, "resampler_n_heads", 16),
        number(told, "resampler_head_dim", 96),
    )
    block = ResamplerBlock(
        Attention(heads, size, dtype=dtype),
        Mlp(4 * width, relu, dtype=dtype),
        LayerNorm,
        _EPSILON,
    )
    stack = Stack(block, number(told, "resampler_depth", 6))
    return Resampler(number(told, "resampler_n_latents", 64), stack, epsilon=_EPSILON)


def _text(config: dict[str, Any], names: set[str], dtype: Any) -> Any:
    depth, every = language.depth_of(config), number(config, "cross_layer_interval", 1)
    if depth % every:
        raise InputError(
            f"config.json: cross_layer_interval={every} must divide num_hidden_layers={depth}"
        )
    turns, epsilon = rotary.rotary_of(config), language.epsilon_of(config)
    norm = RMSNorm if config.get("qk_layer_norms", False) else None

    def mlp() -> Mlp:
        return language.mlp_of(config, 11008, dtype)

    def layer() -> Block:
        own = language.attention_of(config, Scores(turns), dtype)
        return Block(own, mlp(), RMSNorm, epsilon)

    cross = language.attention_of(config, Scores(), dtype, qk_norm=norm)
    chain = Sighted(
        (GatedBlock(cross, mlp(), RMSNorm, epsilon), *(layer() for _ in range(every)))
    )
    made = language.assemble(config, names, [layer()], turns, dtype)
    return made.clone(stack=Stack(chain, depth // every))


def _config(model: Any) -> dict[str, Any] | None:
    if type(model) is not Flamingo or type(model.vision) is not Early or model.skip:
        return None
    stack: Any = model.language.stack
    if type(stack) is not Stack or type(stack.block) is not Sighted:
        return None
    vision = clip.CLIP_VISION.config(_tower(model))
    if vision is None:
        return None
    del vision["architectures"]
    vision |= {"model_type": "idefics_vision", "embed_dim": vision.pop("hidden_size")}
    gated, *layers = stack.block.parts
    if not all(type(block) is Block and type(block.mlp) is Mlp for block in layers):
        return None
    told = language.told(model.language, layers)
    for name in ("num_key_value_heads", "head_dim"):  # It has as many as heads.
        del told[name]
    more = {}
    if type(model.connector) is Resampler:
        block: Any = model.connector.stack.block
        more = {
            "resampler_n_latents": model.connector.count,
            "resampler_depth": model.connector.stack.depth,
            "resampler_n_heads": block.attention.num_heads,
            "resampler_head_dim": block.attention.head_dim,
        }
    return {
        "architectures": ["IdeficsForVisionText2Text"],
        "model_type": "idefics",
        **told,
        "num_hidden_layers": len(layers) * stack.depth,
        "intermediate_size": layers[0].mlp.width,
        "cross_layer_interval": len(layers),
        "qk_layer_norms": gated.attention.qk_norm is not None,
        "use_resampler": bool(more),
        "perceiver_config": {"use_resampler": bool(more), **more},
        "vision_config": vision,
        "image_token_id": model.image,
        **language.told_rotary(model.language, layers[0]),
    }


def _tower(model: Any) -> Any:
    return dataclasses.replace(model.vision.encoder, norm=model.vision.rest[-1])


def _entries(model: Any) -> list[Entry]:
    stack: Any = model.language.stack
    gated, *layers = stack.block.parts
    plain = model.language.clone(stack=Stack(Chain(tuple(layers)), stack.depth))
    found = []
    for entry in language.entries(plain):  # The gated block is the first part.
        path = re.sub(
            r"^stack/block/parts_(\d+)",
            lambda match: f"stack/block/parts_{int(match.group(1)) + 1}",
            entry.ours,
        )
        found.append(dataclasses.replace(entry, ours=f"language/{path}"))
    for entry in clip.CLIP_VISION.entries(_tower(model)):
        ours = f"encoder/{entry.ours}"
        if entry.ours.startswith("norm/"):
            ours = f"rest_0/{entry.ours.removeprefix('norm/')}"
        found.append(
            dataclasses.replace(entry, ours=f"vision/{ours}", theirs=f"{_TOWER}{entry.theirs}")
        )
    return [
        *found,
        *_gated("language/stack/block/parts_0", gated),
        *_resampler(model.connector),
    ]


def _gated(ours: str, block: Any) -> list[Entry]:
    cross, heads = f"{_CROSS}.cross_attn", block.attention.num_heads
    found = parts.attention(f"{ours}/attention", cross, language.NAMES, heads, bias=False)
    if block.attention.qk_norm is not None:
        for name in ("query", "key"):
            theirs = f"{cross}.{name[0]}_layer_norm"
            found += parts.norm(f"{ours}/attention/{name}_norm", theirs, bias=False)
    for name, theirs in language.PRE.items():
        found += parts.norm(f"{ours}/{name}", f"{_CROSS}.{theirs}", bias=False)
    for name in ("gate", "up", "down"):
        found += parts.linear(f"{ours}/mlp/{name}", f"{_CROSS}.mlp.{name}_proj", bias=False)
    for name, theirs in (("attention", "cross_attn"), ("mlp", "dense")):
        found.append(Entry(f"{ours}/{name}_gate/scale", f"{_CROSS}.alpha_{theirs}", "() ->"))
    return found


def _resampler(connector: Any) -> list[Entry]:
    if type(connector) is not Resampler:
        return []
    block: Any = connector.stack
    ours, first, second = (
        "connector/stack/block",
        f"{_LATENTS}.blocks.{{}}.0",
        f"{_LATENTS}.blocks.{{}}.1",
    )
    return [
        Entry("connector/latents/embedding", f"{_LATENTS}.latents", "T D -> T D"),
        *parts.norm("connector/norm", f"{_LATENTS}.layer_norm"),
        *parts.norm(f"{ours}/context_norm", f"{first}.context_layer_norm"),
        *parts.norm(f"{ours}/attention_norm", f"{first}.latents_layer_norm"),
        *parts.attention(
            f"{ours}/attention", first, _RESAMPLER, block.block.attention.num_heads, bias=False
        ),
        *parts.norm(f"{ours}/mlp_norm", f"{second}.ln"),
        *parts.linear(f"{ours}/mlp/up", f"{second}.fc", bias=False),
        *parts.linear(f"{ours}/mlp/down", f"{second}.c_proj", bias=False),
    ]


def _inputs(model: Any) -> list[jax.ShapeDtypeStruct]:
    (image,) = towers.inputs(_tower(model))
    images = jax.ShapeDtypeStruct((1, *image.shape), image.dtype)
    return [jax.ShapeDtypeStruct((1, 1), jnp.int32), images]


IDEFICS = Family(
    name="idefics",
    model=_model,
    config=_config,
    entries=_entries,
    inputs=_inputs,
    ignore=(*towers.IGNORE, *language.IGNORE),
    unpack=language.unpack_head("model.embed_tokens.weight", tied=False),
)
