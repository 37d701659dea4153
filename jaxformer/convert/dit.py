"""DiT as diffusers has it, `DiTTransformer2DModel`, and as its own code does.

The two are not one function: diffusers' frequencies of time end at another, and its norm
before the MLP has another epsilon. diffusers keeps a copy of what embeds time and class in
every block; the hub's are all alike, and only such can be loaded. The original's files are
of torch and without a config: write its tensors as safetensors, and beside them a
`config.json` of `{"model_type": "dit", "depth": 28, ...}`, the arguments of its `DiT`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.convert import parts
from jaxformer.convert.config import activation_of, number
from jaxformer.convert.engine import Entry, Family, Named
from jaxformer.convert.files import Stored
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Mlp, Stack
from jaxformer.layers.embed import PatchEmbed
from jaxformer.layers.norm import BareLayerNorm
from jaxformer.layers.timestep import AdaBlock, AdaNorm
from jaxformer.models.dit import ClassCondition, Denoiser, StretchedPosition
from jaxformer.ops.activation import gelu_tanh
from jaxformer.ops.timestep import cosines_first, cosines_to_period

BLOCK = "transformer_blocks.{}"
# What diffusers has in every block: of block 0 in the table.
COPIED = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.")


def _denoiser(
    *,
    width: int,
    depth: int,
    heads: int,
    patch: int,
    channels: tuple[int, int],  # in, out
    classes: int,
    size: int,
    mlp: Mlp,
    qkv_bias: bool = True,
    mlp_epsilon: float | None = None,
    features: Any = cosines_first,
    dtype: Any,
) -> Denoiser:
    if width % heads or size % patch:
        raise InputError(
            f"config.json: {heads} heads must divide the width {width}, and patches of "
            f"{patch} images of {size}"
        )
    attention = Attention(
        heads,
        width // heads,
        use_bias=qkv_bias,
        out_bias=None if qkv_bias else True,
        dtype=dtype,
    )
    return Denoiser(
        PatchEmbed(
            patch,
            width,
            StretchedPosition(width, (size // patch, size // patch)),
            channels=channels[0],
            dtype=dtype,
        ),
        ClassCondition(width, classes, features=features, dtype=dtype),
        Stack(AdaBlock(attention, mlp, mlp_epsilon=mlp_epsilon), depth),
        AdaNorm(BareLayerNorm()),
        channels[1],
        dtype=dtype,
    )


def _size(model: Any) -> int | None:
    """The side of the images, where a model is a plain DiT of square ones."""
    if not isinstance(model, Denoiser) or not isinstance(model.condition, ClassCondition):
        return None
    position = model.embed.position
    if not isinstance(position, StretchedPosition) or position.shape[0] != position.shape[1]:
        return None
    block = getattr(model.stack, "block", None)
    if not isinstance(block, AdaBlock) or type(block.attention) is not Attention:
        return None
    return position.shape[0] * model.embed.patch if isinstance(block.mlp, Mlp) else None


def _diffusers_model(config: dict[str, Any], names: set[str], dtype: Any) -> nn.Module:
    if config.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
        raise InputError("config.json: norm_type must be 'ada_norm_zero'; DiT has no other")
    if config.get("norm_elementwise_affine"):
        raise InputError("config.json: norm_elementwise_affine must be false, as in DiT's own")
    heads = number(config, "num_attention_heads", 16)
    width = heads * number(config, "attention_head_dim", 72)
    channels = number(config, "in_channels", 4)
    told = config.get("activation_fn", "gelu-approximate")
    name = {"gelu-approximate": "gelu_pytorch_tanh"}.get(told, told)
    mlp = Mlp(
        4 * width,
        activation_of({"activation_fn": name}, "activation_fn", "gelu"),
        use_bias=True,
        dtype=dtype,
    )
    return _denoiser(
        width=width,
        depth=number(config, "num_layers", 28),
        heads=heads,
        patch=number(config, "patch_size", 2),
        channels=(channels, number(config, "out_channels", channels)),
        classes=number(config, "num_embeds_ada_norm", 1000),
        size=number(config, "sample_size", 32),
        mlp=mlp,
        qkv_bias=bool(config.get("attention_bias", True)),
        mlp_epsilon=number(config, "norm_eps", 1e-5),
        features=cosines_to_period,
        dtype=dtype,
    )


def _diffusers_config(model: Any) -> dict[str, Any] | None:
    size = _size(model)
    if size is None:
        return None
    attention, block = model.stack.block.attention, model.stack.block
    tanh = block.mlp.activation is gelu_tanh
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate" if tanh else "gelu",
        "attention_bias": attention.use_bias,
        "attention_head_dim": attention.head_dim,
        "in_channels": model.embed.channels,
        "norm_elementwise_affine": False,
        "norm_eps": block.mlp_epsilon or block.epsilon,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": attention.num_heads,
        "num_embeds_ada_norm": model.condition.num_classes,
        "num_layers": model.stack.depth,
        "out_channels": model.channels,
        "patch_size": model.embed.patch,
        "sample_size": size,
    }


def modulation(ours: str, theirs: str, count: int, **entry) -> list[Entry]:
    """The linear layer that makes `count` vectors, one after the other."""
    sizes = {"P": count}
    return [
        Entry(f"{ours}/kernel", f"{theirs}.weight", "(P D) C -> C P D", sizes, **entry),
        Entry(f"{ours}/bias", f"{theirs}.bias", "(P D) -> P D", sizes, **entry),
    ]


def _diffusers_entries(model: Any) -> list[Entry]:
    embedder = f"{BLOCK.format(0)}.norm1.emb"
    attention = model.stack.block.attention
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
    biases = () if attention.use_bias else ("query", "key", "value")
    return [
        *parts.patches("embed/patch", "pos_embed.proj", model.embed.patch),
        *parts.linear("condition/time/up", f"{embedder}.timestep_embedder.linear_1"),
        *parts.linear("condition/time/down", f"{embedder}.timestep_embedder.linear_2"),
        Entry(
            "condition/label/embedding",
            f"{embedder}.class_embedder.embedding_table.weight",
            "V D -> V D",
        ),
        *modulation("stack/block/modulation/linear", f"{BLOCK}.norm1.linear", 6),
        *parts.attention(
            "stack/block/attention",
            f"{BLOCK}.attn1",
            names,
            attention.num_heads,
            without=biases,
        ),
        *parts.linear("stack/block/mlp/up", f"{BLOCK}.ff.net.0.proj"),
        *parts.linear("stack/block/mlp/down", f"{BLOCK}.ff.net.2"),
        *modulation("norm/modulation/linear", "proj_out_1", 2),
        *parts.linear("head", "proj_out_2"),
    ]


def _without_copies(config: Mapping[str, Any], tensors: dict[str, Stored]):
    """The tensors of block 0 alone, of those that every block has a copy of."""
    depth, kept = number(config, "num_layers", 28), dict(tensors)
    for first in [name for name in tensors if COPIED.match(name)]:
        if not first.startswith("transformer_blocks.0."):
            continue
        own = tensors[first].read()
        for i in range(1, depth):
            name = COPIED.sub(f"transformer_blocks.{i}.norm1.emb.", first)
            copy = kept.pop(name, None)
            if copy is None or not np.array_equal(copy.read(), own):
                fault = "is missing" if copy is None else f"is no copy of {first}"
                raise InputError(
                    f"{name} {fault}; only a DiT that embeds time and class once can be "
                    "loaded, as all of the hub's are"
                )
    return kept


def _with_copies(model: Any, tensors: Iterator[Named]) -> Iterator[Named]:
    for name, tensor in tensors:
        if not COPIED.match(name):
            yield name, tensor
            continue
        for i in range(model.stack.depth):
            yield COPIED.sub(f"transformer_blocks.{i}.norm1.emb.", name), tensor


def _facebook_model(config: dict[str, Any], names: set[str], dtype: Any) -> nn.Module:
    width, channels = number(config, "hidden_size", 1152), number(config, "in_channels", 4)
    mlp = Mlp(
        int(width * number(config, "mlp_ratio", 4.0)), gelu_tanh, use_bias=True, dtype=dtype
    )
    return _denoiser(
        width=width,
        depth=number(config, "depth", 28),
        heads=number(config, "num_heads", 16),
        patch=number(config, "patch_size", 2),
        channels=(channels, channels * (2 if config.get("learn_sigma", True) else 1)),
        classes=number(config, "num_classes", 1000),
        size=number(config, "input_size", 32),
        mlp=mlp,
        dtype=dtype,
    )


def _facebook_config(model: Any) -> dict[str, Any] | None:
    size = _size(model)
    if size is None:
        return None
    return {
        "model_type": "dit",
        "input_size": size,
        "patch_size": model.embed.patch,
        "in_channels": model.embed.channels,
        "hidden_size": model.embed.width,
        "depth": model.stack.depth,
        "num_heads": model.stack.block.attention.num_heads,
        "mlp_ratio": model.stack.block.mlp.width / model.embed.width,
        "num_classes": model.condition.num_classes,
        "learn_sigma": model.channels == 2 * model.embed.channels,
    }


def _facebook_entries(model: Any) -> list[Entry]:
    block, heads = "stack/block", model.stack.block.attention.num_heads
    return [
        *parts.patches("embed/patch", "x_embedder.proj", model.embed.patch),
        *parts.linear("condition/time/up", "t_embedder.mlp.0"),
        *parts.linear("condition/time/down", "t_embedder.mlp.2"),
        Entry("condition/label/embedding", "y_embedder.embedding_table.weight", "V D -> V D"),
        *modulation(f"{block}/modulation/linear", "blocks.{}.adaLN_modulation.1", 6),
        *parts.fused_attention(
            f"{block}/attention", "blocks.{}.attn.qkv", "blocks.{}.attn.proj", heads
        ),
        *parts.linear(f"{block}/mlp/up", "blocks.{}.mlp.fc1"),
        *parts.linear(f"{block}/mlp/down", "blocks.{}.mlp.fc2"),
        *modulation("norm/modulation/linear", "final_layer.adaLN_modulation.1", 2),
        *parts.linear("head", "final_layer.linear"),
    ]


def _with_positions(model: Any, tensors: Iterator[Named]) -> Iterator[Named]:
    """The original keeps its fixed positions as a parameter that is never trained."""
    yield from tensors
    position = model.embed.position
    yield "pos_embed", np.asarray(position.clone(parent=None)(*position.shape))[None]


def inputs(model: Any) -> list[jax.ShapeDtypeStruct]:
    """Shapes that a DiT can be initialised with."""
    size = _size(model)
    assert size is not None
    shape = (1, size, size, model.embed.channels)
    dtypes = {shape: jnp.float32, (1,): jnp.float32}
    found = [jax.ShapeDtypeStruct(s, dtype) for s, dtype in dtypes.items()]
    return [*found, jax.ShapeDtypeStruct((1,), jnp.int32)]


DIFFUSERS = Family(
    name="DiTTransformer2DModel",
    model=_diffusers_model,
    config=_diffusers_config,
    entries=_diffusers_entries,
    inputs=inputs,
    unpack=_without_copies,
    pack=_with_copies,
)
FACEBOOK = Family(
    name="dit",
    model=_facebook_model,
    config=_facebook_config,
    entries=_facebook_entries,
    inputs=inputs,
    ignore=(r"^pos_embed$",),
    pack=_with_positions,
)
