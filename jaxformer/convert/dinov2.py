"""DINOv2 of transformers, with and without registers, alone and as a classifier."""

import functools
from collections.abc import Mapping
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
from jaxformer.convert.files import Stored, join
from jaxformer.errors import InputError
from jaxformer.layers.embed import GridPosition
from jaxformer.models.dino import Size, dinov2
from jaxformer.models.vit import Encoder
from jaxformer.ops.activation import silu

NAMES = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "out": "output.dense",
}
# What transformers 5 calls these in memory.
_MEMORY = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.down_proj\.", ".mlp.weights_out."),
)
REGISTERS = "dinov2_with_registers"


def swiglu_width(width: int, ratio: int) -> int:
    """Of SwiGLU: two thirds of what an MLP would have, up to a multiple of 8."""
    return (int(width * ratio * 2 / 3) + 7) // 8 * 8


def _joined(config: Mapping[str, Any], tensors: dict[str, Stored]) -> dict[str, Stored]:
    """SwiGLU's gate and up, which transformers 5 has apart in memory, as one."""
    found = dict(tensors)
    for name in tensors:
        up, whole = (name.replace(".gate_proj.", f".{n}.") for n in ("up_proj", "weights_in"))
        if ".mlp.gate_proj." in name and up in tensors:
            found[whole] = join(found.pop(name), found.pop(up))
    return found


def _model(kind: str, config: dict[str, Any], names: set[str], dtype: Any) -> Encoder:
    D, N = number(config, "hidden_size", 768), number(config, "num_attention_heads", 12)
    if D % N:
        raise InputError(f"config.json: num_attention_heads={N} must divide hidden_size={D}")
    patch = number(config, "patch_size", 16 if kind == REGISTERS else 14)
    size = pair(config, "image_size", 224)
    if size[0] != size[1] or size[0] % patch:
        raise InputError(
            f"config.json: image_size={size} must be a square that patch_size={patch} divides"
        )
    ratio, gated = number(config, "mlp_ratio", 4), bool(config.get("use_swiglu_ffn", False))
    return dinov2(
        Size(
            D,
            number(config, "num_hidden_layers", 12),
            swiglu_width(D, ratio) if gated else D * ratio,
            N,
            silu if gated else activation_of(config, "hidden_act", "gelu"),
            gated,
            bool(config.get("qkv_bias", True)),
        ),
        patch=patch,
        grid=(size[0] // patch, size[1] // patch),
        registers=number(config, "num_register_tokens", 4) if kind == REGISTERS else 0,
        num_classes=classes(config) if "classifier.weight" in names else 0,
        mask_token=f"{kind}.embeddings.mask_token" in names,
        channels=number(config, "num_channels", 3),
        layer_scale=number(config, "layerscale_value", 1.0),
        epsilon=number(config, "layer_norm_eps", 1e-6),
        dtype=dtype,
    )


def _config(kind: str, model: Any) -> dict[str, Any] | None:
    if not parts.is_plain(model) or not isinstance(model.embed.position, GridPosition):
        return None
    embed, stack, block = model.embed, model.stack, model.stack.block
    shape, D, mlp = embed.position.shape, embed.width, block.mlp
    if shape is None or bool(embed.registers) != (kind == REGISTERS):
        return None
    width = functools.partial(swiglu_width, D) if mlp.gated else lambda ratio: D * ratio
    ratio = next((r for r in range(1, 17) if width(r) == mlp.width), None)
    if ratio is None or block.layer_scale is None:
        return None
    name = "Dinov2WithRegisters" if kind == REGISTERS else "Dinov2"
    own = {"num_register_tokens": embed.registers}
    return {
        "architectures": [name + ("ForImageClassification" if model.num_classes else "Model")],
        "model_type": kind,
        "hidden_size": D,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": block.attention.num_heads,
        "mlp_ratio": ratio,
        "use_swiglu_ffn": mlp.gated,
        "hidden_act": "gelu" if mlp.gated else name_of(mlp.activation),
        "layer_norm_eps": block.epsilon,
        "layerscale_value": block.layer_scale,
        "image_size": shape[0] * embed.patch,
        "patch_size": embed.patch,
        "num_channels": embed.channels or 3,
        "qkv_bias": block.attention.use_bias,
        **(own if kind == REGISTERS else {"use_mask_token": embed.mask is not None}),
        **(labels(model.num_classes) if model.num_classes else {}),
    }


def _entries(kind: str, model: Any) -> list[Entry]:
    embed, mlp = model.embed, model.stack.block.mlp
    before, layer, block = f"{kind}.embeddings", f"{kind}.encoder.layer.{{}}", "stack/block"
    attention = model.stack.block.attention
    found = [
        Entry("embed/cls/embedding", f"{before}.cls_token", "() T D -> T D"),
        Entry("embed/position/embedding", f"{before}.position_embeddings", "() T D -> T D"),
        *parts.patches("embed/patch", f"{before}.patch_embeddings.projection", embed.patch),
        *parts.attention(
            f"{block}/attention",
            f"{layer}.attention",
            NAMES,
            attention.num_heads,
            without=() if attention.use_bias else ("query", "key", "value"),
        ),
        *parts.norm(f"{block}/attention_norm", f"{layer}.norm1"),
        *parts.norm(f"{block}/mlp_norm", f"{layer}.norm2"),
        *parts.layer_scale(f"{block}/attention_scale", f"{layer}.layer_scale1.lambda1"),
        *parts.layer_scale(f"{block}/mlp_scale", f"{layer}.layer_scale2.lambda1"),
        *parts.norm("norm", f"{kind}.layernorm"),
    ]
    if mlp.gated:
        found += parts.linear(f"{block}/mlp/gate", f"{layer}.mlp.weights_in", part=(0, 2))
        found += parts.linear(f"{block}/mlp/up", f"{layer}.mlp.weights_in", part=(1, 2))
        found += parts.linear(f"{block}/mlp/down", f"{layer}.mlp.weights_out")
    else:
        found += parts.linear(f"{block}/mlp/up", f"{layer}.mlp.fc1")
        found += parts.linear(f"{block}/mlp/down", f"{layer}.mlp.fc2")
    if embed.mask is not None:
        found.append(Entry("embed/mask/embedding", f"{before}.mask_token", "T D -> T D"))
    if embed.registers:
        name = f"{before}.register_tokens"
        found.append(Entry("embed/registers/embedding", name, "() T D -> T D"))
    if model.num_classes:
        found += parts.linear("head", "classifier")
    return found


def _family(kind: str) -> Family:
    return Family(
        name=kind,
        model=functools.partial(_model, kind),
        config=functools.partial(_config, kind),
        entries=functools.partial(_entries, kind),
        inputs=lambda model: [parts.image(model.embed)],
        rename=(*_MEMORY, (rf"^(?!{kind}\.|classifier)", f"{kind}.")),
        unpack=_joined,
        spell=functools.partial(parts.bare, kind),
    )


DINOV2, DINOV2_WITH_REGISTERS = _family("dinov2"), _family(REGISTERS)
