"""Gemma, Gemma 2 and the text model of Gemma 3, of transformers.

Weights of norms are what they have more than 1, and from Gemma 2 on they stand before and
after each branch. Tokens' vectors are multiplied by the root of the width.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxformer.convert import language, rotary
from jaxformer.convert.config import number
from jaxformer.convert.engine import Family
from jaxformer.errors import InputError
from jaxformer.layers.attention import Scores
from jaxformer.layers.block import Block, SandwichBlock
from jaxformer.layers.norm import OneRMSNorm
from jaxformer.models.decoder import LanguageModel
from jaxformer.ops.rotary_scaling import Rotary

# The bases of Gemma 3's two kinds of layers, with what 4's configs call them.
THETAS = {language.FULL: ("rope_theta", 1e6), language.SLIDING: ("rope_local_base_freq", 1e4)}


# What a config of the first Gemma leaves out.
_FIRST = {"hidden_size": 3072, "num_attention_heads": 16}
_TANH = "gelu_pytorch_tanh"


def _first_model(config: dict[str, Any], names: set[str], dtype: Any) -> LanguageModel:
    """The first Gemma: blocks as Llama's."""
    language.refuse(config, use_bidirectional_attention=None)
    config = _FIRST | config
    if config.get("hidden_act", "gelu") == "gelu":  # Which in its first configs was by tanh.
        config["hidden_act"] = _TANH
    turns, bias = rotary.rotary_of(config), bool(config.get("attention_bias", False))
    sizes = {"kv_heads": 16, "head_dim": 256, "use_bias": bias}
    blocks = [
        Block(
            language.attention_of(config, Scores(turns), dtype, **sizes),
            language.mlp_of(config, 24576, dtype),
            OneRMSNorm,
            language.epsilon_of(config),
        )
        for _ in range(language.depth_of(config, 28))
    ]
    options = {"vocab": 256000, "tied": True, "scaled": True, "norm": OneRMSNorm}
    return language.assemble(config, names, blocks, turns, dtype, **options)


def _first_config(model: Any) -> dict[str, Any] | None:
    blocks = language.blocks_of(model)
    if not blocks:
        return None
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        **language.told(model, blocks),
        "intermediate_size": blocks[0].mlp.width,
        "attention_bias": blocks[0].attention.use_bias,
        **language.told_rotary(model, blocks[0]),
    }


def _bound(config: Mapping[str, Any], name: str, default: float | None) -> float | None:
    if config.get(name, default) is None:
        return None
    return number(config, name, default or 1.0)


def _rotaries(config: Mapping[str, Any]) -> dict[str, Rotary]:
    """Gemma 3's, by the kind of layer."""
    nested = config.get("rope_parameters") or {}
    found = {}
    for kind, (name, theta) in THETAS.items():
        law = nested.get(kind) or {}
        if kind == language.FULL:
            law = law | (config.get("rope_scaling") or {})
        found[kind] = rotary.read(law, config, number(config, name, theta))
    return found


def _model(version: int, config: dict[str, Any], names: set[str], dtype: Any) -> LanguageModel:
    if config.get("use_bidirectional_attention"):
        raise InputError(
            "config.json: use_bidirectional_attention is not supported; it must be false"
        )
    if version == 2:
        plain = rotary.rotary_of(config)
        rotaries = {language.FULL: plain, language.SLIDING: plain}
        length, period = rotary.length_of(config, plain), 2
    else:  # It does not use the bound of attention, and its length is the stretched one.
        language.refuse(config, attn_logit_softcapping=None)
        rotaries, length = _rotaries(config), rotary.length_of(config, None)
        period = number(config, "sliding_window_pattern", 6)
    scores = Scores(
        scale=number(config, "query_pre_attn_scalar", 256) ** -0.5,
        softcap=_bound(config, "attn_logit_softcapping", 50.0 if version == 2 else None),
    )
    bias = bool(config.get("attention_bias", False))

    def block(window: int | None) -> SandwichBlock:
        turns = rotaries[language.FULL if window is None else language.SLIDING]
        own = dataclasses.replace(scores, rotary=turns, window=window)
        options = {"use_bias": bias, "qk_norm": OneRMSNorm if version == 3 else None}
        return SandwichBlock(
            language.attention_of(config, own, dtype, kv_heads=4, head_dim=256, **options),
            language.mlp_of(
                config, 9216, dtype, activation="hidden_activation", default="gelu_pytorch_tanh"
            ),
            OneRMSNorm,
            language.epsilon_of(config),
        )

    windows = language.windows_of(
        config,
        language.depth_of(config, 26),
        language.window_of(config, 4096),
        lambda i: (i + 1) % period != 0,
    )
    return language.assemble(
        config,
        names,
        [block(window) for window in windows],
        rotaries[language.FULL],
        dtype,
        vocab={2: 256000, 3: 262208}[version],
        tied=True,
        scaled=True,
        norm=OneRMSNorm,
        length=length,
        softcap=_bound(config, "final_logit_softcapping", 30.0 if version == 2 else None),
    )


def _config(version: int, model: Any) -> dict[str, Any] | None:
    blocks = language.blocks_of(model)
    if not blocks:
        return None
    attention, told = blocks[0].attention, language.told(model, blocks)
    scale = attention.scores.scale or attention.head_dim**-0.5
    found = {
        "architectures": [f"Gemma{version}ForCausalLM"],
        "model_type": {2: "gemma2", 3: "gemma3_text"}[version],
        "hidden_activation": told.pop("hidden_act"),
        **told,
        "intermediate_size": blocks[0].mlp.width,
        "attention_bias": attention.use_bias,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": attention.scores.softcap,
        "final_logit_softcapping": model.softcap,
        **language.told_windows(blocks),
    }
    if version == 2:
        return found | language.told_rotary(model, blocks[0])
    laws = {}
    for block in blocks:
        scores = block.attention.scores
        kind = language.FULL if scores.window is None else language.SLIDING
        if scores.rotary is not None:
            laws[kind] = rotary.told_of(scores.rotary)
    return found | {"rope_parameters": laws} | rotary.told_length(model.length, None)


def _family(name: str, model, config) -> Family:
    return Family(
        name=name,
        model=model,
        config=config,
        entries=language.entries,
        inputs=language.inputs,
        rename=language.RENAME,
        ignore=language.IGNORE,
        unpack=language.unpack_head("model.embed_tokens.weight", tied=True),
    )


GEMMA = _family("gemma", _first_model, _first_config)
GEMMA2, GEMMA3 = (
    _family(name, functools.partial(_model, version), functools.partial(_config, version))
    for version, name in ((2, "gemma2"), (3, "gemma3_text"))
)
