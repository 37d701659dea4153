"""Entries of the parts that many families share."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.convert.engine import Entry
from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Stack
from jaxformer.layers.embed import PatchEmbed
from jaxformer.models.vit import Encoder


def is_plain(model: Any) -> bool:
    """Whether it is an encoder of patches, by blocks of plain attention and MLP.

    Of such a model a family can read all sizes; other parts may be any.
    """
    if type(model) is not Encoder or type(model.embed) is not PatchEmbed:
        return False
    block = getattr(model.stack, "block", None)
    return (
        type(model.stack) is Stack
        and type(block) is Block
        and type(block.attention) is Attention
        and type(block.mlp) is Mlp
    )


def image(embed: Any) -> jax.ShapeDtypeStruct:
    """One image of the size for which positions of patches are made."""
    rows, columns = (n * embed.patch for n in embed.position.shape)
    return jax.ShapeDtypeStruct((1, rows, columns, embed.channels or 3), jnp.float32)


def bare(kind: str, model: Any, name: str) -> str:
    """A model without a classifier has its tensors without the prefix."""
    return name if model.num_classes else name.removeprefix(f"{kind}.")


def linear(ours: str, theirs: str, bias: bool = True, **entry) -> list[Entry]:
    """A linear layer: torch has `[out, in]`."""
    found = [Entry(f"{ours}/kernel", f"{theirs}.weight", "O I -> I O", **entry)]
    return found + (
        [Entry(f"{ours}/bias", f"{theirs}.bias", "O -> O", **entry)] if bias else []
    )


def norm(ours: str, theirs: str, bias: bool = True, **entry) -> list[Entry]:
    """LayerNorm, or RMSNorm without `bias`."""
    found = [Entry(f"{ours}/scale", f"{theirs}.weight", "D -> D", **entry)]
    return found + (
        [Entry(f"{ours}/bias", f"{theirs}.bias", "D -> D", **entry)] if bias else []
    )


def layer_scale(ours: str, theirs: str) -> list[Entry]:
    """A factor for each channel; `theirs` is the whole name."""
    return [Entry(f"{ours}/scale", theirs, "D -> D")]


def patches(ours: str, theirs: str, patch: int, bias: bool = True) -> list[Entry]:
    """A strided convolution as the product that it is."""
    sizes = {"p": patch, "q": patch}
    layout = "D C p q -> (p q C) D"
    found = [Entry(f"{ours}/kernel", f"{theirs}.weight", layout, sizes)]
    return found + ([Entry(f"{ours}/bias", f"{theirs}.bias", "D -> D")] if bias else [])


def attention(
    ours: str,
    theirs: str,
    names: Mapping[str, str],
    heads: int,
    *,
    kv_heads: int | None = None,
    bias: bool = True,
    without: tuple[str, ...] = (),
    **entry,
) -> list[Entry]:
    """Query, key, value and out, each a linear layer of its own.

    Args:
      ours: the path of the attention, such as "stack/block/attention".
      theirs: what stands before `names`, such as "encoder.layer.{}.attention".
      names: what theirs calls `query`, `key`, `value` and `out`.
      heads: of queries.
      kv_heads: of keys and values, where they are fewer.
      bias: whether the four have one.
      without: those of the four that have none all the same.
      **entry: more of each `Entry`.
    """
    found = []
    for name, count in (
        ("query", heads),
        ("key", kv_heads or heads),
        ("value", kv_heads or heads),
    ):
        path, tensor, sizes = f"{ours}/{name}", f"{theirs}.{names[name]}", {"N": count}
        found.append(
            Entry(f"{path}/kernel", f"{tensor}.weight", "(N H) D -> D N H", sizes, **entry)
        )
        if bias and name not in without:
            found.append(
                Entry(f"{path}/bias", f"{tensor}.bias", "(N H) -> N H", sizes, **entry)
            )
    path, tensor = f"{ours}/out", f"{theirs}.{names['out']}"
    found.append(
        Entry(f"{path}/kernel", f"{tensor}.weight", "D (N H) -> N H D", {"N": heads}, **entry)
    )
    if bias and "out" not in without:
        found.append(Entry(f"{path}/bias", f"{tensor}.bias", "D -> D", **entry))
    return found


def fused_attention(
    ours: str,
    qkv: str,
    out: str,
    heads: int,
    *,
    bias: bool = True,
    without: tuple[str, ...] = (),
    **entry,
) -> list[Entry]:
    """Query, key and value in one tensor, one after the other, and `out` beside it.

    `qkv` and `out` are names without `.weight`; torch's own attention writes `in_proj` as
    one word, `in_proj_weight`: name it `...in_proj_` for that. `bias` is whether the four
    have one, but for those `without`.
    """
    found, sizes = [], {"N": heads}
    dot = "" if qkv.endswith("_") else "."
    for i, name in enumerate(("query", "key", "value")):
        part = {"part": (i, 3), **entry}
        found.append(
            Entry(
                f"{ours}/{name}/kernel", f"{qkv}{dot}weight", "(N H) D -> D N H", sizes, **part
            )
        )
        if bias and name not in without:
            found.append(
                Entry(f"{ours}/{name}/bias", f"{qkv}{dot}bias", "(N H) -> N H", sizes, **part)
            )
    found.append(
        Entry(f"{ours}/out/kernel", f"{out}.weight", "D (N H) -> N H D", sizes, **entry)
    )
    if bias and "out" not in without:
        found.append(Entry(f"{ours}/out/bias", f"{out}.bias", "D -> D", **entry))
    return found
