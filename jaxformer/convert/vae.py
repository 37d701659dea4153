"""Autoencoders of diffusers: `AutoencoderKL` and `VQModel`."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxformer.convert import parts
from jaxformer.convert.config import number
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.models.vae import KLAutoencoder, VQAutoencoder

# What older files call the attention's linear layers.
OLDER = tuple(
    (rf"(mid_block\.attentions\.0)\.{old}\.", rf"\1.{new}.")
    for old, new in (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out.0"),
    )
)


def _fields(config: dict[str, Any], dtype: Any, depth: int = 1) -> dict[str, Any]:
    widths = config.get("block_out_channels", (64,))
    if not isinstance(widths, list | tuple) or not widths:
        raise InputError(f"config.json: block_out_channels={widths!r} must be a list of sizes")
    for name, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        found = config.get(f"{name}_block_types", (kind,))
        if list(found) != [kind] * len(widths):
            raise InputError(
                f"config.json: {name}_block_types={list(found)} must be {kind} for each of "
                f"{len(widths)} block_out_channels; no other is known"
            )
    if config.get("act_fn", "silu") != "silu":
        raise InputError("config.json: act_fn must be 'silu'; no other is known")
    channels = number(config, "in_channels", 3)
    if number(config, "out_channels", 3) != channels:
        raise InputError("config.json: out_channels must be in_channels; no other is known")
    return {
        "widths": tuple(widths),
        "depth": number(config, "layers_per_block", depth),
        "channels": channels,
        "groups": number(config, "norm_num_groups", 32),
        "looks": bool(config.get("mid_block_add_attention", True)),
        "dtype": dtype,
    }


def _kl_model(config: dict[str, Any], names: set[str], dtype: Any) -> nn.Module:
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise InputError(
            "config.json: latents_mean and latents_std must be null; scaling_factor and "
            "shift_factor are what is known"
        )
    mixes = bool(config.get("use_quant_conv", True))
    if bool(config.get("use_post_quant_conv", True)) != mixes:
        raise InputError("config.json: use_post_quant_conv must be use_quant_conv")
    return KLAutoencoder(
        **_fields(config, dtype),
        latent=number(config, "latent_channels", 4),
        mixes=mixes,
        scale=number(config, "scaling_factor", 0.18215),
        shift=float(config.get("shift_factor") or 0.0),
    )


def _told(model: Any, name: str) -> dict[str, Any]:
    return {
        "_class_name": name,
        "act_fn": "silu",
        "block_out_channels": list(model.widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(model.widths),
        "in_channels": model.channels,
        "latent_channels": model.latent,
        "layers_per_block": model.depth,
        "mid_block_add_attention": model.looks,
        "norm_num_groups": model.groups,
        "out_channels": model.channels,
        "up_block_types": ["UpDecoderBlock2D"] * len(model.widths),
    }


def _kl_config(model: Any) -> dict[str, Any] | None:
    if not isinstance(model, KLAutoencoder):
        return None
    return {
        **_told(model, "AutoencoderKL"),
        "scaling_factor": model.scale,
        "shift_factor": model.shift or None,
        "use_post_quant_conv": model.mixes,
        "use_quant_conv": model.mixes,
    }


def conv(ours: str, theirs: str) -> list[Entry]:
    """A convolution: torch has `[out, in, rows, columns]`."""
    return [
        Entry(f"{ours}/kernel", f"{theirs}.weight", "O I P Q -> P Q I O"),
        Entry(f"{ours}/bias", f"{theirs}.bias", "O -> O"),
    ]


def _residual(ours: str, theirs: str, widens: bool) -> list[Entry]:
    found = [
        *parts.norm(f"{ours}/first_norm", f"{theirs}.norm1"),
        *conv(f"{ours}/first", f"{theirs}.conv1"),
        *parts.norm(f"{ours}/second_norm", f"{theirs}.norm2"),
        *conv(f"{ours}/second", f"{theirs}.conv2"),
    ]
    return found + (conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut") if widens else [])


def _around(side: str, looks: bool) -> list[Entry]:
    found = [
        *conv(f"{side}/start", f"{side}.conv_in"),
        *parts.norm(f"{side}/norm", f"{side}.conv_norm_out"),
        *conv(f"{side}/end", f"{side}.conv_out"),
    ]
    middle = f"{side}.mid_block"
    for i, name in enumerate(("first", "second")):
        found += _residual(f"{side}/middle/{name}", f"{middle}.resnets.{i}", False)
    if looks:
        names = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
        ours, theirs = f"{side}/middle/look", f"{middle}.attentions.0"
        found += parts.norm(f"{ours}/norm", f"{theirs}.group_norm")
        found += parts.attention(f"{ours}/attention", theirs, names, 1)
    return found


def _blocks(side: str, widths: Sequence[int], depth: int, ours: str, between: str):
    """Residuals at each size, and the convolution between one and the next."""
    found, before = [], widths[0]
    name, scaler = ("down", "downsamplers") if ours == "down" else ("up", "upsamplers")
    for i, width in enumerate(widths):
        theirs = f"{side}.{name}_blocks.{i}"
        for j in range(depth):
            found += _residual(
                f"{side}/{ours}_{i}_{j}", f"{theirs}.resnets.{j}", before != width
            )
            before = width
        if i + 1 < len(widths):
            found += conv(f"{side}/{between}_{i}", f"{theirs}.{scaler}.0.conv")
    return found


def _entries(model: Any) -> list[Entry]:
    widths = list(model.widths)
    found = [
        *_around("encoder", model.looks),
        *_around("decoder", model.looks),
        *_blocks("encoder", widths, model.depth, "down", "narrow"),
        *_blocks("decoder", widths[::-1], model.depth + 1, "up", "widen"),
    ]
    if not isinstance(model, KLAutoencoder) or model.mixes:
        found += [*conv("encoded", "quant_conv"), *conv("decoded", "post_quant_conv")]
    if isinstance(model, VQAutoencoder):
        found.append(Entry("codebook/embedding", "quantize.embedding.weight", "V C -> V C"))
    return found


def _vq_model(config: dict[str, Any], names: set[str], dtype: Any) -> nn.Module:
    if config.get("norm_type", "group") != "group":
        raise InputError("config.json: norm_type must be 'group'; no other is known")
    if config.get("lookup_from_codebook"):
        raise InputError("config.json: lookup_from_codebook must be false")
    latent = number(config, "latent_channels", 3)
    return VQAutoencoder(
        **_fields(config, dtype),
        latent=latent,
        codes=number(config, "num_vq_embeddings", 256),
        code_width=number(config, "vq_embed_dim", latent),
    )


def _vq_config(model: Any) -> dict[str, Any] | None:
    if not isinstance(model, VQAutoencoder):
        return None
    return {
        **_told(model, "VQModel"),
        "num_vq_embeddings": model.codes,
        "vq_embed_dim": model.code_width or model.latent,
    }


def inputs(model: Any) -> list[jax.ShapeDtypeStruct]:
    """Shapes that an autoencoder can be initialised with."""
    side = 2 ** (len(model.widths) - 1)
    return [jax.ShapeDtypeStruct((1, side, side, model.channels), jnp.float32)]


KL = Family(
    name="AutoencoderKL",
    model=_kl_model,
    config=_kl_config,
    entries=_entries,
    inputs=inputs,
    rename=OLDER,
)
VQ = Family(
    name="VQModel",
    model=_vq_model,
    config=_vq_config,
    entries=_entries,
    inputs=inputs,
    rename=OLDER,
)
