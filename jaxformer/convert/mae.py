"""MAE of transformers: `ViTMAEForPreTraining`, and the encoder alone, `ViTMAEModel`."""

from typing import Any

import jax

from jaxformer.convert import parts, vit
from jaxformer.convert.config import name_of, number, pair
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.layers.embed import FixedPosition, PatchEmbed
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import Average, First
from jaxformer.models.mae import DECODER, Autoencoder, Decoder, Visible
from jaxformer.models.vit import Encoder

_TENSORS = "vit.embeddings"


def _model(config: dict[str, Any], names: set[str], dtype: Any) -> Encoder | Autoencoder:
    stack = vit.blocks(config, dtype)
    D, patch = number(config, "hidden_size", 768), number(config, "patch_size", 16)
    size = pair(config, "image_size", 224)
    if size[0] % patch or size[1] % patch:
        raise InputError(f"config.json: patch_size={patch} must divide image_size={size}")
    ratio = config.get("mask_ratio", 0.75)
    if not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise InputError(f"config.json: mask_ratio={ratio!r} must be at least 0 and below 1")
    grid = (size[0] // patch, size[1] // patch)
    embed = PatchEmbed(
        patch,
        D,
        FixedPosition(D, grid, prefix=1),
        prefix=1,
        channels=number(config, "num_channels", 3),
        dtype=dtype,
    )
    encoder = Encoder(
        Visible(embed, ratio),
        stack,
        LayerNorm(stack.block.epsilon),
        Average(1) if config.get("use_mean_pooling") else First(),
        dtype=dtype,
    )
    if "decoder.mask_token" not in names:
        return encoder
    D = number(config, "decoder_hidden_size", DECODER.width)
    return Autoencoder(
        encoder,
        Decoder(
            D,
            FixedPosition(D, grid, prefix=1),
            vit.blocks(config, dtype, DECODER, before="decoder_"),
            LayerNorm(stack.block.epsilon),
            dtype,
        ),
        bool(config.get("norm_pix_loss", False)),
    )


def _config(model: Any) -> dict[str, Any] | None:
    whole = isinstance(model, Autoencoder)
    encoder = model.encoder if whole else model
    if not isinstance(encoder, Encoder) or not isinstance(encoder.embed, Visible):
        return None
    embed, stack = encoder.embed.embed, encoder.stack
    position = embed.position
    if not isinstance(position, FixedPosition) or position.shape is None:
        return None
    size = [n * embed.patch for n in position.shape]
    config = {
        "architectures": ["ViTMAEForPreTraining" if whole else "ViTMAEModel"],
        "model_type": "vit_mae",
        "hidden_size": embed.width,
        **vit.told(stack),
        "hidden_act": name_of(stack.block.mlp.activation),
        "layer_norm_eps": stack.block.epsilon,
        "image_size": size[0] if size[0] == size[1] else size,
        "patch_size": embed.patch,
        "num_channels": embed.channels or 3,
        "qkv_bias": stack.block.attention.use_bias,
        "mask_ratio": encoder.embed.ratio,
    }
    if isinstance(encoder.pool, Average):
        config["use_mean_pooling"] = True  # As their BEiT says it; ViTMAE does not pool.
    if whole:
        config |= {"decoder_hidden_size": model.decoder.width}
        config |= vit.told(model.decoder.stack, "decoder_")
        config |= {"norm_pix_loss": model.normalize}
    return config


def _entries(model: Any) -> list[Entry]:
    whole = isinstance(model, Autoencoder)
    encoder, ours = (model.encoder, "encoder/") if whole else (model, "")
    patch = encoder.embed.embed.patch
    found = [
        Entry(f"{ours}embed/cls/embedding", f"{_TENSORS}.cls_token", "() T D -> T D"),
        Entry(f"{ours}embed/position/bias", f"{_TENSORS}.position_embeddings", "() T D -> T D"),
        *parts.patches(f"{ours}embed/patch", f"{_TENSORS}.patch_embeddings.projection", patch),
        *vit.layers(f"{ours}stack", "vit.encoder.layer.{}", encoder.stack),
        *parts.norm(f"{ours}norm", "vit.layernorm"),
    ]
    if not whole:
        return found
    return [
        *found,
        *parts.linear("decoder/embed", "decoder.decoder_embed"),
        Entry("decoder/mask/embedding", "decoder.mask_token", "() T D -> T D"),
        Entry("decoder/position/bias", "decoder.decoder_pos_embed", "() T D -> T D"),
        *vit.layers("decoder/stack", "decoder.decoder_layers.{}", model.decoder.stack),
        *parts.norm("decoder/norm", "decoder.decoder_norm"),
        *parts.linear("decoder/head", "decoder.decoder_pred"),
    ]


def _inputs(model: Any) -> list[jax.ShapeDtypeStruct]:
    encoder = model.encoder if isinstance(model, Autoencoder) else model
    return [parts.image(encoder.embed.embed)]


def _spell(model: Any, name: str) -> str:
    return name if isinstance(model, Autoencoder) else name.removeprefix("vit.")


MAE = Family(
    name="vit_mae",
    model=_model,
    config=_config,
    entries=_entries,
    inputs=_inputs,
    rename=(
        # What transformers 5 writes, which transformers 4 does not know.
        (r"decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
        *vit.MEMORY,
        (r"(decoder_layers\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
        (r"(decoder_layers\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
        (r"^(?!vit\.|decoder\.)", "vit."),
    ),
    spell=_spell,
)
