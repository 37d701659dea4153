"""Video transformers of transformers: ViViT and VideoMAE, models and classifiers.

Of VideoMAE's pre-training there is nothing here: its decoder is another model.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.convert import parts, vit
from jaxformer.convert.config import classes, labels, name_of, number, pair
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.layers.block import Block, Stack
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import Average, First, TanhLayer
from jaxformer.models.video import JointPosition, RowSincos, TubeletEmbed
from jaxformer.models.vit import Encoder

HEADS = {"vivit": "classifier", "videomae": "classifier|fc_norm"}


def _size(config: dict[str, Any], frames: int, tubelet: int, patch: int):
    """Frames, rows and columns of what a model is made for."""
    size = (number(config, "num_frames", frames), *pair(config, "image_size", 224))
    if size[0] % tubelet or size[1] % patch or size[2] % patch:
        raise InputError(
            f"config.json: tubelets of {tubelet} frames of {patch} x {patch} pixels must "
            f"divide num_frames and image_size, {size}"
        )
    return size


def _vivit(config: dict[str, Any], names: set[str], dtype: Any) -> Encoder:
    cut = config.get("tubelet_size", [2, 16, 16])
    if not isinstance(cut, list | tuple) or len(cut) != 3 or cut[1] != cut[2]:
        raise InputError(
            f"config.json: tubelet_size={cut!r} must be three numbers, the last two equal"
        )
    tubelet, patch, _ = (number({"tubelet_size": n}, "tubelet_size", 2) for n in cut)
    F, Y, X = size = _size(config, 32, tubelet, patch)
    stack = vit.blocks(config, dtype, activation="gelu_fast", epsilon=1e-6)
    D = number(config, "hidden_size", 768)
    pooled = "vivit.pooler.dense.weight" in names
    if pooled and config.get("pooler_act", "tanh") != "tanh":
        raise InputError("config.json: pooler_act must be 'tanh'; no other is known")
    position = JointPosition(D, (F // tubelet, Y // patch, X // patch), prefix=1)
    channels = number(config, "num_channels", 3)
    return Encoder(
        TubeletEmbed(tubelet, patch, D, position, 1, size, channels, dtype=dtype),
        stack,
        LayerNorm(stack.block.epsilon),
        First(),
        TanhLayer(number(config, "pooler_output_size", D), dtype=dtype) if pooled else None,
        classes(config) if "classifier.weight" in names else 0,
        dtype=dtype,
    )


def _videomae(config: dict[str, Any], names: set[str], dtype: Any) -> Encoder:
    tubelet, patch = number(config, "tubelet_size", 2), number(config, "patch_size", 16)
    biases: dict[str, Any] = {"use_bias": True, "key_bias": False}
    if not config.get("qkv_bias", config.get("qv_bias", True)):
        biases = {"use_bias": False, "out_bias": True}
    stack = vit.blocks(config, dtype, **biases)
    D, mean = number(config, "hidden_size", 768), bool(config.get("use_mean_pooling", True))
    classifies = "classifier.weight" in names
    size, channels = _size(config, 16, tubelet, patch), number(config, "num_channels", 3)
    return Encoder(
        TubeletEmbed(tubelet, patch, D, RowSincos(D), 0, size, channels, dtype=dtype),
        stack,
        None if mean else LayerNorm(stack.block.epsilon),
        Average() if mean else First(),
        LayerNorm(1e-5) if mean and classifies else None,
        classes(config) if classifies else 0,
        dtype=dtype,
    )


def _config(kind: str, model: Any) -> dict[str, Any] | None:
    if not isinstance(model, Encoder) or type(model.embed) is not TubeletEmbed:
        return None
    embed, stack = model.embed, model.stack
    position = {"vivit": JointPosition, "videomae": RowSincos}[kind]
    if not isinstance(embed.position, position) or embed.size is None:
        return None
    if not isinstance(stack, Stack) or not isinstance(stack.block, Block):
        return None
    F, *size = embed.size
    task = "ForVideoClassification" if model.num_classes else "Model"
    name = {"vivit": "Vivit", "videomae": "VideoMAE"}[kind]
    config = {
        "architectures": [name + task],
        "model_type": kind,
        "hidden_size": embed.width,
        **vit.told(stack),
        "hidden_act": name_of(stack.block.mlp.activation),
        "layer_norm_eps": stack.block.epsilon,
        "num_frames": F,
        "image_size": size[0] if size[0] == size[1] else size,
        "num_channels": embed.channels or 3,
        "qkv_bias": stack.block.attention.use_bias,
        **(labels(model.num_classes) if model.num_classes else {}),
    }
    if kind == "vivit":
        config["tubelet_size"] = [embed.tubelet, embed.patch, embed.patch]
        if isinstance(model.neck, TanhLayer):
            config["pooler_output_size"] = model.neck.width
    else:
        config |= {"tubelet_size": embed.tubelet, "patch_size": embed.patch}
        config["use_mean_pooling"] = model.norm is None
    return config


def _entries(kind: str, model: Any) -> list[Entry]:
    embed, embeddings = model.embed, f"{kind}.embeddings"
    projection = f"{embeddings}.patch_embeddings.projection"
    found = [
        Entry(
            "embed/patch/kernel",
            f"{projection}.weight",
            "D C t p q -> (t p q C) D",
            {"t": embed.tubelet, "p": embed.patch, "q": embed.patch},
        ),
        Entry("embed/patch/bias", f"{projection}.bias", "D -> D"),
        *vit.layers("stack", f"{kind}.encoder.layer.{{}}", model.stack),
    ]
    if kind == "vivit":
        table = "embed/position/embedding"
        found += [
            Entry("embed/cls/embedding", f"{embeddings}.cls_token", "() T D -> T D"),
            Entry(table, f"{embeddings}.position_embeddings", "() T D -> T D"),
        ]
    if model.norm is not None:
        found += parts.norm("norm", f"{kind}.layernorm")
    if isinstance(model.neck, TanhLayer):
        found += parts.linear("neck/linear", f"{kind}.pooler.dense")
    elif model.neck is not None:
        found += parts.norm("neck", "fc_norm")
    return found + (parts.linear("head", "classifier") if model.num_classes else [])


def _inputs(model: Any) -> list[jax.ShapeDtypeStruct]:
    embed = model.embed
    return [jax.ShapeDtypeStruct((1, *embed.size, embed.channels or 3), jnp.float32)]


def _spell(kind: str, model: Any, name: str) -> str:
    if kind == "videomae":
        name = name.replace("attention.query.bias", "attention.q_bias")
        name = name.replace("attention.value.bias", "attention.v_bias")
    return parts.bare(kind, model, name)


def _family(kind: str, model: Any) -> Family:
    return Family(
        name=kind,
        model=model,
        config=functools.partial(_config, kind),
        entries=functools.partial(_entries, kind),
        inputs=_inputs,
        rename=(
            (r"\.attention\.q_bias$", ".attention.query.bias"),
            (r"\.attention\.v_bias$", ".attention.value.bias"),
            *vit.MEMORY,
            (rf"^(?!{kind}\.|{HEADS[kind]})", f"{kind}."),
        ),
        spell=functools.partial(_spell, kind),
    )


VIVIT, VIDEOMAE = _family("vivit", _vivit), _family("videomae", _videomae)
