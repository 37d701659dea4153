"""Every family, by the `model_type` of its config. A new family is a file and a line here."""

from collections.abc import Mapping
from typing import Any

from jaxformer.convert import (
    blip2,
    clip,
    dinov2,
    dinov3,
    dit,
    experts,
    gemma,
    gemma_vlm,
    gpt2,
    idefics,
    inception,
    internvl,
    llama,
    mae,
    mllama,
    mmdit,
    opt,
    qwen3_vl,
    qwen_vl,
    siglip,
    siglip2,
    swin,
    tiled,
    timm,
    unmask,
    vae,
    video,
    vit,
    vlm,
)
from jaxformer.convert.engine import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        vit.VIT,
        vit.DEIT,
        mae.MAE,
        swin.SWIN,
        video.VIVIT,
        video.VIDEOMAE,
        siglip.SIGLIP,
        siglip.SIGLIP_VISION,
        siglip.SIGLIP_TEXT,
        siglip2.SIGLIP2,
        siglip2.SIGLIP2_VISION,
        siglip2.SIGLIP2_TEXT,
        clip.CLIP,
        clip.CLIP_VISION,
        clip.CLIP_TEXT,
        dinov2.DINOV2,
        dinov2.DINOV2_WITH_REGISTERS,
        dinov3.DINOV3,
        timm.TIMM,
        inception.INCEPTION,
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN2,
        llama.QWEN3,
        gpt2.GPT2,
        opt.OPT,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
        experts.MIXTRAL,
        experts.QWEN3_MOE,
        vlm.LLAVA,
        vlm.PALIGEMMA,
        qwen_vl.QWEN2_VL,
        qwen_vl.QWEN25_VL,
        qwen3_vl.QWEN3_VL,
        gemma_vlm.GEMMA3_VLM,
        internvl.INTERNVL,
        tiled.LLAVA_NEXT,
        idefics.IDEFICS,
        blip2.BLIP2,
        mllama.MLLAMA,
        dit.DIFFUSERS,
        dit.FACEBOOK,
        mmdit.SD3,
        mmdit.QWEN,
        vae.KL,
        vae.VQ,
        unmask.LLADA,
        unmask.DREAM,
    )
}


def kind_of(config: Mapping[str, Any]) -> str | None:
    """The name of a config's family; timm has an `architecture`, diffusers a `_class_name`."""
    named = config.get("architecture")
    timms = named if named in FAMILIES else "timm"
    kind = config.get("model_type", timms if "architecture" in config else None)
    kind = config.get("_class_name", kind)
    return kind if isinstance(kind, str) else None
