"""CLIP of transformers: `CLIPModel`, and its towers alone, with their projection or without.

The towers are `CLIPVisionModel`, `CLIPTextModel` and the two `...WithProjection`.
"""

from typing import Any

from jaxformer.convert import parts, towers
from jaxformer.convert.config import number
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.embed import PatchEmbed
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import First
from jaxformer.layers.text import AtEnd, TokenEmbed
from jaxformer.models.clip import TwoTowers
from jaxformer.models.vit import Encoder, Size

# What a config leaves out.
_VISION, _TEXT, _ACT = Size(768, 12, 3072, 12), Size(512, 12, 2048, 8), "quick_gelu"
_PROJECTION = {"vision": "visual_projection", "text": "text_projection"}


def _projection(config: dict[str, Any], dtype: Any) -> Einsum:
    width = number(config, "projection_dim", 512)
    return Einsum("BD,DP->BP", {"P": width}, dtype=dtype)


def _vision(config: dict[str, Any], dtype: Any, neck: Einsum | None) -> Encoder:
    epsilon = number(config, "layer_norm_eps", 1e-5)
    options = {"use_bias": False, "norm": LayerNorm(epsilon)}
    embed = towers.patch_embed(config, _VISION, 32, 1, dtype, **options)
    stack = towers.stack(config, _VISION, _ACT, epsilon, dtype)
    return Encoder(embed, stack, LayerNorm(epsilon), First(), neck, dtype=dtype)


def _text(config: dict[str, Any], dtype: Any, neck: Einsum | None) -> Encoder:
    D, epsilon = number(config, "hidden_size", 512), number(config, "layer_norm_eps", 1e-5)
    vocab, length = (
        number(config, "vocab_size", 49408),
        number(config, "max_position_embeddings", 77),
    )
    # Configs that say 2 are of before the end token was one of the config.
    end = config.get("eos_token_id", 49407)
    if isinstance(end, bool) or not isinstance(end, int):
        raise InputError(f"config.json: eos_token_id={end!r} must be one number")
    return Encoder(
        TokenEmbed(vocab, D, length, causal=True, dtype=dtype),
        towers.stack(config, _TEXT, _ACT, epsilon, dtype),
        LayerNorm(epsilon),
        AtEnd(None if end == 2 else end),
        neck,
        dtype=dtype,
    )


def _clip(config: dict[str, Any], names: set[str], dtype: Any) -> TwoTowers:
    vision, text = towers.towers_of(config)
    scale = number(config, "logit_scale_init_value", 2.6592)
    return TwoTowers(
        _vision(vision, dtype, _projection(config, dtype)),
        _text(text, dtype, _projection(config, dtype)),
        scale,
    )


def _alone(tower: str):
    make = {"vision": _vision, "text": _text}[tower]

    def model(config: dict[str, Any], names: set[str], dtype: Any) -> Encoder:
        projects = f"{_PROJECTION[tower]}.weight" in names
        return make(config, dtype, _projection(config, dtype) if projects else None)

    return model


def _vision_config(model: Any) -> dict[str, Any] | None:
    if not towers.is_tower(model, PatchEmbed) or not isinstance(model.pool, First):
        return None
    image = towers.image_config(model.embed)
    if image is None:
        return None
    return {"model_type": "clip_vision_model", **_config(model), **image}


def _text_config(model: Any) -> dict[str, Any] | None:
    if not towers.is_tower(model, TokenEmbed) or not isinstance(model.pool, AtEnd):
        return None
    end = model.pool.end
    return {
        "model_type": "clip_text_model",
        **_config(model),
        "vocab_size": model.embed.vocab,
        "max_position_embeddings": model.embed.length,
        "eos_token_id": 2 if end is None else end,
    }


def _config(model: Any) -> dict[str, Any]:
    projects = isinstance(model.neck, Einsum)
    width = {"projection_dim": model.neck.sizes["P"]} if projects else {}
    return {**towers.config_of(model), **width}


def _alone_config(tower: str):
    name, found = {
        "vision": ("CLIPVisionModel", _vision_config),
        "text": ("CLIPTextModel", _text_config),
    }[tower]

    def config(model: Any) -> dict[str, Any] | None:
        told = found(model)
        projects = told is not None and "projection_dim" in told
        name_of = name + ("WithProjection" if projects else "")
        return told and {"architectures": [name_of], **told}

    return config


def _clip_config(model: Any) -> dict[str, Any] | None:
    if not isinstance(model, TwoTowers) or model.bias is not None:
        return None
    vision, text = _vision_config(model.vision), _text_config(model.text)
    if vision is None or text is None or "projection_dim" not in vision:
        return None
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": vision["projection_dim"],
        "logit_scale_init_value": model.scale,
        "vision_config": vision,
        "text_config": text,
    }


def _vision_entries(ours: str, tower: Encoder) -> list[Entry]:
    theirs = "vision_model"
    return [
        *towers.patches(ours, tower.embed),
        Entry(
            f"{ours}embed/cls/embedding", f"{theirs}.embeddings.class_embedding", "D -> D", at=0
        ),
        *parts.norm(f"{ours}embed/norm", f"{theirs}.pre_layrnorm"),
        *towers.layers(ours, theirs, tower),
        *parts.norm(f"{ours}norm", f"{theirs}.post_layernorm"),
        *_neck(ours, "vision", tower),
    ]


def _text_entries(ours: str, tower: Encoder) -> list[Entry]:
    return [*towers.text(ours, tower), *_neck(ours, "text", tower)]


def _neck(ours: str, kind: str, tower: Encoder) -> list[Entry]:
    if tower.neck is None:
        return []
    return parts.linear(f"{ours}neck", _PROJECTION[kind], bias=False)


def _clip_entries(model: Any) -> list[Entry]:
    return [
        *_vision_entries("vision/", model.vision),
        *_text_entries("text/", model.text),
        Entry("logits/scale", "logit_scale", "->"),
    ]


def _family_alone(tower: str) -> Family:
    entries = {"vision": _vision_entries, "text": _text_entries}[tower]
    return Family(
        name=f"clip_{tower}_model",
        model=_alone(tower),
        config=_alone_config(tower),
        entries=lambda model: entries("", model),
        inputs=towers.inputs,
        rename=((rf"^(?!{tower}_model\.|{_PROJECTION[tower]}\.)", f"{tower}_model."),),
        ignore=towers.IGNORE,
    )


CLIP = Family(
    name="clip",
    model=_clip,
    config=_clip_config,
    entries=_clip_entries,
    inputs=towers.inputs,
    ignore=towers.IGNORE,
)
CLIP_VISION, CLIP_TEXT = _family_alone("vision"), _family_alone("text")
