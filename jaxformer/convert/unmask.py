"""Masked-diffusion models as their authors keep them: LLaDA and Dream.

Both see both ways. LLaDA is a Llama under names of its own. Dream is Qwen 2, and its logits
are of the next token: `models.mdlm.denoiser(model, params, shift=True)` moves them. The token
that says "masked" is no part of a model: `mask_token_id` of its `config.json`.

Source: `modeling_llada.py`, `configuration_llada.py` and `modeling_dream.py` of GSAI-ML's and
Dream-org's files on the hub.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxformer.convert import language
from jaxformer.convert.config import number
from jaxformer.convert.engine import Family
from jaxformer.convert.files import Stored
from jaxformer.convert.llama import QWEN, Kind
from jaxformer.convert.rotary import told_of
from jaxformer.errors import InputError
from jaxformer.models.decoder import LanguageModel
from jaxformer.models.mdlm import MASK_IDS, SIZES


def told_mask(name: str, vocab: int) -> dict[str, Any]:
    """What a config says of the mask: that of the published model of this vocabulary."""
    known = SIZES[name]["vocab"] == vocab
    return {"mask_token_id": MASK_IDS[name]} if known else {}


class _Dream(Kind):
    """Its own code is of transformers 4, and reads `rope_theta` and `rope_scaling`."""

    def told(self, model, blocks):
        rotary = blocks[0].attention.scores.rotary
        if rotary is None:
            return {}
        law = told_of(rotary)
        theta = law.pop("rope_theta")
        scaling = None if law["rope_type"] == "default" else law
        found = {"rope_theta": theta, "rope_scaling": scaling}
        return found | told_mask("dream-7b", model.table.vocab)


DREAM = _Dream("Dream", "DreamModel", bias=True, causal=False, **QWEN).family()


# What LLaDA's config and Llama's call the same thing.
_WORDS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "embedding_size": "vocab_size",
    "activation_type": "hidden_act",
    "weight_tying": "tie_word_embeddings",
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
# What its config can say otherwise, and is then another model.
_ALWAYS = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "rope": True,
    "alibi": False,
    "scale_logits": False,
    "block_group_size": 1,
    "clip_qkv": None,
}
# What their tensors are called.
_LAYER = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_PREFIX = "model.transformer"


class _Llada(Kind):
    """LLaDA: its config in Llama's words, and its tensors under Llama's names."""

    def model(self, config: dict[str, Any], names: set[str], dtype: Any) -> LanguageModel:
        """The model of a config."""
        language.refuse(config, quantization_config=None, **_ALWAYS)
        missing = [k for k in ("d_model", "n_layers", "n_heads") if config.get(k) is None]
        if missing:
            raise InputError(f"config.json: {', '.join(missing)} must be given")
        words = _words(config)
        try:
            return super().model(words, names, dtype)
        except InputError as error:
            said = str(error)
            for own, word in _WORDS.items():
                said = said.replace(word, own)
            raise InputError(said) from None

    def config(self, model: Any) -> dict[str, Any] | None:
        """The config of a model."""
        words = super().config(model)
        if words is None:
            return None
        rotary = language.blocks_of(model)[0].attention.scores.rotary
        words["rope_theta"] = None if rotary is None else rotary.theta
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            **{own: words.get(word) for own, word in _WORDS.items()},
            "vocab_size": words["vocab_size"],
            **_ALWAYS,
            **told_mask("llada-8b", model.table.vocab),
        }

    def family(self) -> Family:
        """Llama's table, under other names."""
        return dataclasses.replace(
            super().family(), rename=_RENAME, ignore=(), spell=_spell, unpack=_unpack
        )


def _words(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in Llama's words; what it does not say is as its class has it."""
    kv_heads = config.get("n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if config.get("multi_query_attention") else config["n_heads"]
    own = {
        "embedding_size": config.get("embedding_size") or config.get("vocab_size"),
        "n_kv_heads": kv_heads,
        "mlp_hidden_size": number(config, "mlp_ratio", 4) * number(config, "d_model", 768),
        "weight_tying": True,
        "max_sequence_length": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
    }
    own |= {name: config[name] for name in _WORDS if config.get(name) is not None}
    return {word: own[name] for name, word in _WORDS.items() if name in own}


_RENAME = (
    *((rf"^{_PREFIX}\.{own}\.", f"{word}.") for own, word in _OUTSIDE.items()),
    *(
        (rf"^{_PREFIX}\.blocks\.(\d+)\.{own}\.", rf"model.layers.\1.{word}.")
        for own, word in _LAYER.items()
    ),
)


def _spell(model: Any, name: str) -> str:
    """LLaDA's name of one of Llama's tensors."""
    name, kind = name.rsplit(".", 1)
    outside = {word: own for own, word in _OUTSIDE.items()}
    if name in outside:
        return f"{_PREFIX}.{outside[name]}.{kind}"
    number, _, part = name.removeprefix("model.layers.").partition(".")
    own = next(own for own, word in _LAYER.items() if word == part)
    return f"{_PREFIX}.blocks.{number}.{own}.{kind}"


def _unpack(config: Mapping[str, Any], tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Takes away a head that is tied."""
    words = {"tie_word_embeddings": config.get("weight_tying") is not False}
    return language.unpack_head("model.embed_tokens.weight", tied=True)(words, tensors)


LLADA = _Llada("llada", "LLaDAModelLM", bias=False, causal=False).family()
