"""DINOv3's vision transformer of transformers, `DINOv3ViTModel`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.convert import parts
from jaxformer.convert.config import activation_of, name_of, number
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.layers.embed import CenteredAngles
from jaxformer.models.dino import Size, dinov3
from jaxformer.models.vit import Encoder

NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
# What is fixed in every model of this family; the config may say so, and no more.
_FIXED = {"key_bias": False, "proj_bias": True, "mlp_bias": True}


def _model(config: dict[str, Any], names: set[str], dtype: Any) -> Encoder:
    for name, value in _FIXED.items():
        if bool(config.get(name, value)) != value:
            raise InputError(f"config.json: {name} must be {value}; no other is known")
    biases = {bool(config.get(name, True)) for name in ("query_bias", "value_bias")}
    if len(biases) > 1:
        raise InputError("config.json: query_bias and value_bias must be the same")
    D, N = number(config, "hidden_size", 384), number(config, "num_attention_heads", 6)
    if D % N or D // N % 4:
        raise InputError(
            f"config.json: num_attention_heads={N} must divide hidden_size={D} into heads of "
            "a multiple of 4"
        )
    model = dinov3(
        Size(
            D,
            number(config, "num_hidden_layers", 12),
            number(config, "intermediate_size", 1536),
            N,
            activation_of(config, "hidden_act", "gelu"),
            bool(config.get("use_gated_mlp", False)),
            biases.pop(),
        ),
        patch=number(config, "patch_size", 16),
        registers=number(config, "num_register_tokens", 0),
        channels=number(config, "num_channels", 3),
        layer_scale=number(config, "layerscale_value", 1.0),
        epsilon=number(config, "layer_norm_eps", 1e-5),
        dtype=dtype,
    )
    rotary = CenteredAngles(
        D // N,
        number(config, "rope_theta", 100.0),
        shift=_reach(config, "pos_embed_shift"),
        jitter=_reach(config, "pos_embed_jitter"),
        rescale=_reach(config, "pos_embed_rescale", 2.0),
    )
    return dataclasses.replace(model, embed=dataclasses.replace(model.embed, rotary=rotary))


def _reach(config: dict[str, Any], name: str, default: float | None = None) -> float | None:
    """A number, or None where the config says null; it may say nothing."""
    value = config.get(name, default)
    return None if value is None else number({name: value}, name, 1.0)


def _config(model: Any) -> dict[str, Any] | None:
    if not parts.is_plain(model) or not isinstance(model.embed.rotary, CenteredAngles):
        return None
    embed, stack, block = model.embed, model.stack, model.stack.block
    bias, rotary = block.attention.use_bias, embed.rotary
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": embed.width,
        "intermediate_size": block.mlp.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": block.attention.num_heads,
        "hidden_act": name_of(block.mlp.activation),
        "use_gated_mlp": block.mlp.gated,
        "query_bias": bias,
        "value_bias": bias,
        **_FIXED,
        "layer_norm_eps": block.epsilon,
        "layerscale_value": block.layer_scale,
        "num_register_tokens": embed.registers,
        "patch_size": embed.patch,
        "num_channels": embed.channels or 3,
        "rope_theta": rotary.theta,
        "pos_embed_shift": rotary.shift,
        "pos_embed_jitter": rotary.jitter,
        "pos_embed_rescale": rotary.rescale,
    }


def _entries(model: Any) -> list[Entry]:
    embed, attention = model.embed, model.stack.block.attention
    layer, block, mlp = "layer.{}", "stack/block", model.stack.block.mlp
    tokens = {"cls": "cls_token", "mask": "mask_token", "registers": "register_tokens"}
    found = [
        *(
            Entry(f"embed/{ours}/embedding", f"embeddings.{theirs}", "() T D -> T D")
            for ours, theirs in tokens.items()
        ),
        *parts.patches("embed/patch", "embeddings.patch_embeddings", embed.patch),
        *parts.attention(
            f"{block}/attention",
            f"{layer}.attention",
            NAMES,
            attention.num_heads,
            without=("key",) if attention.use_bias else ("query", "key", "value"),
        ),
        *parts.norm(f"{block}/attention_norm", f"{layer}.norm1"),
        *parts.norm(f"{block}/mlp_norm", f"{layer}.norm2"),
        *parts.layer_scale(f"{block}/attention_scale", f"{layer}.layer_scale1.lambda1"),
        *parts.layer_scale(f"{block}/mlp_scale", f"{layer}.layer_scale2.lambda1"),
        *parts.norm("norm", "norm"),
    ]
    for name in ("gate", "up", "down") if mlp.gated else ("up", "down"):
        found += parts.linear(f"{block}/mlp/{name}", f"{layer}.mlp.{name}_proj")
    return found


def _inputs(model: Any) -> list[jax.ShapeDtypeStruct]:
    embed = model.embed
    side = embed.patch * 2
    return [jax.ShapeDtypeStruct((1, side, side, embed.channels or 3), jnp.float32)]


DINOV3 = Family(
    name="dinov3_vit",
    model=_model,
    config=_config,
    entries=_entries,
    inputs=_inputs,
    rename=((r"^model\.(?=layer\.)", ""),),  # As transformers 5 has it in memory.
    ignore=(r"rope_embeddings\.inv_freq$",),
)
