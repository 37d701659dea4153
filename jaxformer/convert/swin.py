"""Swin of transformers: `SwinForImageClassification` and `SwinModel`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.convert import parts
from jaxformer.convert.config import activation_of, classes, labels, name_of, number, pair
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.layers.block import Mlp
from jaxformer.layers.embed import PatchEmbed
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import Average
from jaxformer.models.swin import (
    EPSILON,
    GridEmbed,
    Pair,
    Stages,
    WindowAttention,
    drop_paths,
    stage,
)
from jaxformer.models.vit import Encoder

NAMES = {
    "query": "self.query",
    "key": "self.key",
    "value": "self.value",
    "out": "output.dense",
}


def _numbers(config: dict[str, Any], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    found = config.get(name, default)
    if not isinstance(found, list | tuple):
        raise InputError(f"config.json: {name}={found!r} must be a list of numbers")
    return tuple(number({name: n}, name, 1) for n in found)


def _model(config: dict[str, Any], names: set[str], dtype: Any) -> Encoder:
    if config.get("use_absolute_embeddings"):
        raise InputError("config.json: use_absolute_embeddings must be false, as in Swin's own")
    width = number(config, "embed_dim", 96)
    depths = _numbers(config, "depths", (2, 2, 6, 2))
    heads = _numbers(config, "num_heads", (3, 6, 12, 24))
    if len(depths) != len(heads) or any(n % 2 for n in depths):
        raise InputError(
            f"config.json: depths={list(depths)} must be even, and as many as "
            f"num_heads={list(heads)}"
        )
    window, ratio = number(config, "window_size", 7), number(config, "mlp_ratio", 4.0)
    epsilon = number(config, "layer_norm_eps", 1e-5)
    drop, qkv = config.get("drop_path_rate", 0.1), bool(config.get("qkv_bias", True))
    if not isinstance(drop, int | float) or not 0 <= drop < 1:
        raise InputError(f"config.json: drop_path_rate={drop!r} must be at least 0, below 1")
    stages = []
    for i, (depth, N) in enumerate(zip(depths, heads, strict=True)):
        D = width * 2**i
        if D % N:
            raise InputError(f"config.json: num_heads={list(heads)}: {N} must divide {D}")
        attention = WindowAttention(
            N,
            D // N,
            use_bias=qkv,
            out_bias=None if qkv else True,
            dtype=dtype,
            window=window,
        )
        mlp = Mlp(
            int(ratio * D),
            activation_of(config, "hidden_act", "gelu"),
            use_bias=True,
            dtype=dtype,
        )
        rates = drop_paths(depths, drop)[i]
        stages.append(stage(attention, mlp, depth, epsilon=epsilon, drop_path=rates))
    embed = PatchEmbed(
        number(config, "patch_size", 4),
        width,
        norm=LayerNorm(EPSILON),
        channels=number(config, "num_channels", 3),
        dtype=dtype,
    )
    return Encoder(
        GridEmbed(embed, pair(config, "image_size", 224)),
        Stages(tuple(stages), dtype=dtype),
        LayerNorm(epsilon),
        Average(),
        num_classes=classes(config) if "classifier.weight" in names else 0,
        dtype=dtype,
    )


def _config(model: Any) -> dict[str, Any] | None:
    if not isinstance(model, Encoder) or not isinstance(model.stack, Stages):
        return None
    if not isinstance(model.embed, GridEmbed) or model.embed.size is None:
        return None
    embed, stages = model.embed.embed, model.stack.stages
    if not all(isinstance(stack.block, Pair) for stack in stages):
        return None
    size = list(model.embed.size)
    first, last = stages[0].block.first, stages[-1]
    rates = last.drop_path
    return {
        "architectures": ["SwinForImageClassification" if model.num_classes else "SwinModel"],
        "model_type": "swin",
        "embed_dim": embed.width,
        "depths": [2 * stack.depth for stack in stages],
        "num_heads": [stack.block.first.attention.num_heads for stack in stages],
        "window_size": first.attention.window,
        "mlp_ratio": first.mlp.width / embed.width,
        "hidden_act": name_of(first.mlp.activation),
        "layer_norm_eps": first.epsilon,
        "qkv_bias": first.attention.use_bias,
        "drop_path_rate": float(rates if isinstance(rates, int | float) else rates[-1][-1]),
        "use_absolute_embeddings": False,
        "image_size": size[0] if size[0] == size[1] else size,
        "patch_size": embed.patch,
        "num_channels": embed.channels or 3,
        **(labels(model.num_classes) if model.num_classes else {}),
    }


def _entries(model: Any) -> list[Entry]:
    embed = model.embed.embed
    found = [
        *parts.patches(
            "embed/patch", "swin.embeddings.patch_embeddings.projection", embed.patch
        ),
        *parts.norm("embed/norm", "swin.embeddings.norm"),
        *parts.norm("norm", "swin.layernorm"),
    ]
    for i, stack in enumerate(model.stack.stages):
        layer = f"swin.encoder.layers.{i}"
        if i:
            merge, theirs = f"stack/merge_{i - 1}", f"swin.encoder.layers.{i - 1}.downsample"
            found += parts.norm(f"{merge}/norm", f"{theirs}.norm")
            found += parts.linear(f"{merge}/reduce", f"{theirs}.reduction", bias=False)
        for j, name in enumerate(("first", "second")):
            ours, theirs = f"stack/stages_{i}/block/{name}", f"{layer}.blocks.{{}}"
            attention = getattr(stack.block, name).attention
            block = [
                *parts.attention(
                    f"{ours}/attention",
                    f"{theirs}.attention",
                    NAMES,
                    attention.num_heads,
                    without=() if attention.use_bias else ("query", "key", "value"),
                ),
                Entry(
                    f"{ours}/attention/bias",
                    f"{theirs}.attention.self.relative_position_bias_table",
                    "R N -> R N",
                ),
                *parts.norm(f"{ours}/attention_norm", f"{theirs}.layernorm_before"),
                *parts.norm(f"{ours}/mlp_norm", f"{theirs}.layernorm_after"),
                *parts.linear(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
                *parts.linear(f"{ours}/mlp/down", f"{theirs}.output.dense"),
            ]
            alternate = range(j, 2 * stack.depth, 2)
            found += [dataclasses.replace(entry, layers=alternate) for entry in block]
    return found + (parts.linear("head", "classifier") if model.num_classes else [])


def _inputs(model: Any) -> list[jax.ShapeDtypeStruct]:
    embed = model.embed.embed
    side = embed.patch * 2 ** len(model.stack.stages)
    return [jax.ShapeDtypeStruct((1, side, side, embed.channels or 3), jnp.float32)]


SWIN = Family(
    name="swin",
    model=_model,
    config=_config,
    entries=_entries,
    inputs=_inputs,
    rename=(
        (r"\.attention\.q_proj\.", ".attention.self.query."),
        (r"\.attention\.k_proj\.", ".attention.self.key."),
        (r"\.attention\.v_proj\.", ".attention.self.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.attention\.relative_position_bias\.", ".attention.self."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^(?!swin\.|classifier)", "swin."),
    ),
    ignore=(r"\.relative_position_index$", r"embeddings\.mask_token$"),
    spell=functools.partial(parts.bare, "swin"),
)
