"""What the towers of CLIP, SigLIP and SigLIP 2 share in transformers' files."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.convert import parts
from jaxformer.convert.config import activation_of, name_of, number
from jaxformer.convert.engine import Entry
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Stack
from jaxformer.layers.embed import GridPosition, PatchEmbed, TrimmedEmbed
from jaxformer.layers.pack import PackedEmbed
from jaxformer.layers.text import TokenEmbed
from jaxformer.models.clip import TwoTowers
from jaxformer.models.vit import Encoder, Size

IGNORE = (r"embeddings\.position_ids$",)  # Counted from 0 in every file that has them.
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


def towers_of(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of the two towers, vision first.

    Files of 2022 have a `text_config_dict` besides, which then holds instead.
    """
    found = []
    for name in ("vision_config", "text_config"):
        tower = config.get(f"{name}_dict") or config.get(name) or {}
        if not isinstance(tower, dict):
            raise InputError(f"config.json: {name} must be an object, not {tower!r}")
        found.append(tower)
    return found[0], found[1]


def attention(config: dict[str, Any], sizes: Size, dtype: Any) -> Attention:
    """The attention of a tower."""
    D = number(config, "hidden_size", sizes.width)
    N = number(config, "num_attention_heads", sizes.num_heads)
    if D % N:
        raise InputError(f"config.json: num_attention_heads={N} must divide hidden_size={D}")
    return Attention(N, D // N, use_bias=True, dtype=dtype)


def mlp(config: dict[str, Any], sizes: Size, act: str, dtype: Any) -> Mlp:
    """The MLP of a tower; `act` is what its config leaves out."""
    width = number(config, "intermediate_size", sizes.mlp_dim)
    return Mlp(width, activation_of(config, "hidden_act", act), use_bias=True, dtype=dtype)


def stack(config: dict[str, Any], sizes: Size, act: str, epsilon: float, dtype: Any) -> Stack:
    """The layers of a tower; `sizes` and `act` are what its config leaves out."""
    block = Block(
        attention(config, sizes, dtype), mlp(config, sizes, act, dtype), epsilon=epsilon
    )
    return Stack(block, number(config, "num_hidden_layers", sizes.depth))


def patch_embed(
    config: dict[str, Any], sizes: Size, patch: int, prefix: int, dtype: Any, **options
) -> PatchEmbed:
    """Patches of square images of any size, with learned positions."""
    D = number(config, "hidden_size", sizes.width)
    side, patch = number(config, "image_size", 224), number(config, "patch_size", patch)
    if side < patch:
        raise InputError(f"config.json: image_size={side} is less than patch_size={patch}")
    position = GridPosition(D, shape=(side // patch, side // patch), prefix=prefix)
    options |= {"channels": number(config, "num_channels", 3), "dtype": dtype}
    options |= {"position": position, "prefix": prefix}
    if side % patch:
        return TrimmedEmbed(patch, D, size=(side, side), **options)
    return PatchEmbed(patch, D, **options)


def is_tower(model: Any, embed: type) -> bool:
    """Whether it is an encoder of plain blocks, which `config_of` can read."""
    block = getattr(getattr(model, "stack", None), "block", None)
    return (
        type(model) is Encoder
        and isinstance(model.embed, embed)
        and type(model.stack) is Stack
        and type(block) is Block
        and type(block.attention) is Attention
        and type(block.mlp) is Mlp
    )


def config_of(tower: Encoder) -> dict[str, Any]:
    """What a config says of a tower's layers."""
    block = tower.stack.block
    return {
        "hidden_size": tower.embed.width,
        "num_hidden_layers": tower.stack.depth,
        "num_attention_heads": block.attention.num_heads,
        "intermediate_size": block.mlp.width,
        "hidden_act": name_of(block.mlp.activation),
        "layer_norm_eps": block.epsilon,
    }


def layers(ours: str, theirs: str, tower: Encoder) -> list[Entry]:
    """The entries of a tower's layers; `ours` is "" or ends in a slash."""
    block, layer = f"{ours}stack/block", f"{theirs}.encoder.layers.{{}}"
    heads = tower.stack.block.attention.num_heads
    return [
        *parts.attention(f"{block}/attention", f"{layer}.self_attn", _ATTENTION, heads),
        *parts.norm(f"{block}/attention_norm", f"{layer}.layer_norm1"),
        *parts.norm(f"{block}/mlp_norm", f"{layer}.layer_norm2"),
        *parts.linear(f"{block}/mlp/up", f"{layer}.mlp.fc1"),
        *parts.linear(f"{block}/mlp/down", f"{layer}.mlp.fc2"),
    ]


def text(ours: str, tower: Encoder) -> list[Entry]:
    """The entries of a text tower, without what comes after its last norm."""
    theirs = "text_model"
    tables = [
        Entry(
            f"{ours}embed/{name}/embedding",
            f"{theirs}.embeddings.{name}_embedding.weight",
            "T D -> T D",
        )
        for name in ("token", "position")
    ]
    norm = parts.norm(f"{ours}norm", f"{theirs}.final_layer_norm")
    return [*tables, *layers(ours, theirs, tower), *norm]


def patches(ours: str, embed: Any) -> list[Entry]:
    """The entries of an image's patches and their positions."""
    theirs = "vision_model.embeddings"
    return [
        *parts.patches(
            f"{ours}embed/patch", f"{theirs}.patch_embedding", embed.patch, embed.use_bias
        ),
        Entry(
            f"{ours}embed/position/embedding",
            f"{theirs}.position_embedding.weight",
            "T D -> T D",
        ),
    ]


def image_config(embed: Any) -> dict[str, Any] | None:
    """What a config says of images; None where they are not of a square that it can say."""
    position = embed.position
    if not isinstance(position, GridPosition) or position.shape is None:
        return None
    rows, columns = position.shape
    if rows != columns or embed.channels is None:
        return None
    side = rows * embed.patch
    if isinstance(embed, TrimmedEmbed) and embed.size is not None:
        side = embed.size[0]
    return {"image_size": side, "patch_size": embed.patch, "num_channels": embed.channels}


def inputs(model: Any) -> list[jax.ShapeDtypeStruct]:
    """One example of what a tower, or both, can be called with."""
    if isinstance(model, TwoTowers):
        return [*inputs(model.vision), *inputs(model.text)]
    embed = model.embed
    if isinstance(embed, TokenEmbed):
        return [jax.ShapeDtypeStruct((1, embed.length), jnp.int32)]
    rows, columns = embed.position.shape
    if isinstance(embed, PackedEmbed):
        patches = (1, rows * columns, embed.patch**2 * embed.channels)
        grids = jax.ShapeDtypeStruct((1, 1, 2), jnp.int32)
        return [jax.ShapeDtypeStruct(patches, jnp.float32), grids]
    image = (1, rows * embed.patch, columns * embed.patch, embed.channels)
    return [jax.ShapeDtypeStruct(image, jnp.float32)]
