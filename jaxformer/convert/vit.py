"""ViT and DeiT of transformers: `ViTModel`, `ViTForImageClassification`, and the DeiT ones."""

import functools
from typing import Any

from jaxformer.convert import parts
from jaxformer.convert.config import (
    activation_of,
    classes,
    labels,
    name_of,
    number,
    pair,
)
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Stack
from jaxformer.layers.embed import GridPosition, PatchEmbed
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import First, TanhLayer
from jaxformer.models.vit import SIZES, Encoder, Size, TwoHeads

NAMES = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "out": "output.dense",
}
# What transformers 5 calls these in memory.
MEMORY = (
    (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"(layer\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(layer\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
)


def blocks(
    config: dict[str, Any],
    dtype: Any,
    size: Size = SIZES["B"],
    *,
    before: str = "",
    activation: str = "gelu",
    epsilon: float = 1e-12,
    **attention,
) -> Stack:
    """The blocks that a config tells of, and those of many models beside ViT.

    Args:
      config: theirs.
      dtype: what is computed in.
      size: what the config's class takes where the config says nothing.
      before: what stands before the names of sizes, such as "decoder_".
      activation: what the config's class takes.
      epsilon: what the config's class takes.
      **attention: of `Attention`, in the place of what the config says of biases.
    """
    width, heads = f"{before}hidden_size", f"{before}num_attention_heads"
    D, N = number(config, width, size.width), number(config, heads, size.num_heads)
    if D % N:
        raise InputError(f"config.json: {heads}={N} must divide {width}={D}")
    qkv = bool(config.get("qkv_bias", True))
    biases = {"use_bias": qkv, "out_bias": None if qkv else True}
    return Stack(
        Block(
            Attention(N, D // N, **(attention or biases), dtype=dtype),
            Mlp(
                number(config, f"{before}intermediate_size", size.mlp_dim),
                activation_of(config, "hidden_act", activation),
                use_bias=True,
                dtype=dtype,
            ),
            epsilon=number(config, "layer_norm_eps", epsilon),
        ),
        number(config, f"{before}num_hidden_layers", size.depth),
    )


def told(stack: Any, before: str = "") -> dict[str, Any]:
    """What a config says of the sizes of `blocks`, but for their width."""
    return {
        f"{before}num_hidden_layers": stack.depth,
        f"{before}num_attention_heads": stack.block.attention.num_heads,
        f"{before}intermediate_size": stack.block.mlp.width,
    }


def layers(ours: str, theirs: str, stack: Any) -> list[Entry]:
    """The table of `blocks`: `ours` is the path of the stack, `theirs` ends in `.{}`."""
    attention, block = stack.block.attention, f"{ours}/block"
    biases = {"query": attention.use_bias, "key": attention.key_bias}
    biases |= {"value": attention.use_bias, "out": attention.out_bias}
    return [
        *parts.attention(
            f"{block}/attention",
            f"{theirs}.attention",
            NAMES,
            attention.num_heads,
            without=tuple(
                name
                for name, own in biases.items()
                if not (attention.use_bias if own is None else own)
            ),
        ),
        *parts.norm(f"{block}/attention_norm", f"{theirs}.layernorm_before"),
        *parts.norm(f"{block}/mlp_norm", f"{theirs}.layernorm_after"),
        *parts.linear(f"{block}/mlp/up", f"{theirs}.intermediate.dense"),
        *parts.linear(f"{block}/mlp/down", f"{theirs}.output.dense"),
    ]


def _model(kind: str, config: dict[str, Any], names: set[str], dtype: Any) -> Encoder:
    stack = blocks(config, dtype)
    D = number(config, "hidden_size", 768)
    size, patch = pair(config, "image_size", 224), number(config, "patch_size", 16)
    if size[0] % patch or size[1] % patch:
        raise InputError(f"config.json: patch_size={patch} must divide image_size={size}")
    pooled = f"{kind}.pooler.dense.weight" in names
    if pooled and config.get("pooler_act", "tanh") != "tanh":
        raise InputError("config.json: pooler_act must be 'tanh'; no other is known")
    prefix = 2 if kind == "deit" else 1
    teacher = "cls_classifier.weight" in names
    return (TwoHeads if teacher else Encoder)(
        PatchEmbed(
            patch,
            D,
            GridPosition(D, shape=(size[0] // patch, size[1] // patch), prefix=prefix),
            prefix=prefix,
            channels=number(config, "num_channels", 3),
            dtype=dtype,
        ),
        stack,
        LayerNorm(stack.block.epsilon),
        First(),
        TanhLayer(number(config, "pooler_output_size", D), dtype=dtype) if pooled else None,
        classes(config) if teacher or "classifier.weight" in names else 0,
        dtype=dtype,
    )


def _config(kind: str, model: Any) -> dict[str, Any] | None:
    if not isinstance(model, Encoder) or not isinstance(model.embed, PatchEmbed):
        return None
    embed, stack, position = model.embed, model.stack, model.embed.position
    if not isinstance(position, GridPosition) or position.shape is None:
        return None
    if embed.prefix != (2 if kind == "deit" else 1):
        return None
    block = stack.block
    name = {"vit": "ViT", "deit": "DeiT"}[kind]
    task = "ForImageClassification" if model.num_classes else "Model"
    task += "WithTeacher" if isinstance(model, TwoHeads) else ""
    neck = {"pooler_output_size": model.neck.width} if isinstance(model.neck, TanhLayer) else {}
    config = {
        "architectures": [name + task],
        "model_type": kind,
        "hidden_size": embed.width,
        **told(stack),
        "hidden_act": name_of(block.mlp.activation),
        "layer_norm_eps": block.epsilon,
        "image_size": [n * embed.patch for n in position.shape],
        "patch_size": embed.patch,
        "num_channels": embed.channels or 3,
        "qkv_bias": block.attention.use_bias,
        **neck,
        **(labels(model.num_classes) if model.num_classes else {}),
    }
    if position.shape[0] == position.shape[1]:
        config["image_size"] = config["image_size"][0]
    return config


def _entries(kind: str, model: Any) -> list[Entry]:
    embed = model.embed
    found = [
        Entry(
            "embed/position/embedding",
            f"{kind}.embeddings.position_embeddings",
            "() T D -> T D",
        ),
        *parts.patches(
            "embed/patch", f"{kind}.embeddings.patch_embeddings.projection", embed.patch
        ),
        *layers("stack", f"{kind}.encoder.layer.{{}}", model.stack),
        *parts.norm("norm", f"{kind}.layernorm"),
    ]
    for i, name in enumerate(("cls_token", "distillation_token")[: embed.prefix]):
        found.append(
            Entry("embed/cls/embedding", f"{kind}.embeddings.{name}", "() () D -> D", at=i)
        )
    if model.neck is not None:
        found += parts.linear("neck/linear", f"{kind}.pooler.dense")
    if isinstance(model, TwoHeads):
        found += parts.linear("head", "cls_classifier")
        found += parts.linear("second_head", "distillation_classifier")
    elif model.num_classes:
        found += parts.linear("head", "classifier")
    return found


def _family(kind: str) -> Family:
    alone = rf"^(?!{kind}\.|classifier|cls_classifier|distillation_classifier)"
    return Family(
        name=kind,
        model=functools.partial(_model, kind),
        config=functools.partial(_config, kind),
        entries=functools.partial(_entries, kind),
        inputs=lambda model: [parts.image(model.embed)],
        rename=(*MEMORY, (alone, f"{kind}.")),
        ignore=(r"embeddings\.mask_token$",),
        spell=functools.partial(parts.bare, kind),
    )


VIT, DEIT = _family("vit"), _family("deit")
