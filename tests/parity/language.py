"""Language models of transformers: Llama and its kin, GPT-2, Gemma, and mixtures of experts."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from jaxformer.layers.block import Block
from jaxformer.layers.norm import OneRMSNorm, RMSNorm
from jaxformer.ops.activation import gelu
from jaxformer.ops.rotary_scaling import Rotary
from tests.parity.case import Case, edit, wrong

TINY = {
    "vocab_size": 19,
    "hidden_size": 20,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def _original(kind: str, **fields):
    import transformers

    name = kind.replace("Text", "")
    fields = TINY | fields
    if fields["head_dim"] is None:  # By the width and the heads.
        del fields["head_dim"]
    config = getattr(transformers, f"{kind}Config")(**fields)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {
        "n_embd": 20,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 26,
        "n_positions": 14,
    }
    sizes |= {"vocab_size": 19, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(layer_norm_epsilon=1e-3, **sizes))


def _tokens(draw):
    return {"tokens": draw.integers(3, 19, size=(2, 12)).astype("int32")}


def _logits(module, inputs):
    if hasattr(module.config, "num_experts"):  # Their kernels take widths of 16 bytes.
        module.set_experts_implementation("eager")
    return {"logits": module(inputs["tokens"].long(), use_cache=False).logits}


def _our_logits(model, variables, inputs):
    return {"logits": model.apply(variables, inputs["tokens"])}


def blocks(change):
    """A mutation of every block: `change(block)` is what it becomes."""

    def walk(node):
        if hasattr(node, "attention"):
            return change(node)
        if hasattr(node, "parts"):
            return dataclasses.replace(node, parts=tuple(walk(part) for part in node.parts))
        return dataclasses.replace(node, block=walk(node.block))

    return lambda model, inputs: (
        dataclasses.replace(model, stack=walk(model.stack)),
        inputs,
    )


def every(path, value):
    """A mutation of a field of every block."""
    return blocks(lambda block: edit(block, path, value))


def _scores(**fields):
    def change(block):
        old = block.attention.scores
        new = {k: v(old) if callable(v) else v for k, v in fields.items()}
        return edit(block, "attention.scores", dataclasses.replace(old, **new))

    return blocks(change)


def _law(**fields):
    """A mutation of a law of rotary positions."""

    def change(scores):
        if scores.rotary.scaling is None:
            return scores.rotary
        return edit(
            scores.rotary, "scaling", dataclasses.replace(scores.rotary.scaling, **fields)
        )

    return _scores(rotary=change)


def _theta(theta, windows):
    """Another base, for the layers with a window or for those without."""

    def change(scores):
        same = (scores.window is not None) != windows
        return scores.rotary if same else edit(scores.rotary, "theta", theta)

    return _scores(rotary=change)


@dataclasses.dataclass(frozen=True)
class _Interleaved(Rotary):
    """Angles as they would stand if pairs were neighbours."""

    def angles(self, positions, head_dim):
        found = super().angles(positions, head_dim)
        return jnp.repeat(found, 2, -1)[..., : head_dim // 2]


def _interleave(scores):
    return _Interleaved(scores.rotary.theta, scores.rotary.scaling)


def _window(by):
    return _scores(window=lambda old: old.window and old.window + by)


def _moe(field, value):
    """A mutation of the blocks that have experts."""

    def change(block):
        sparse = hasattr(block.mlp, "experts")
        return edit(block, f"mlp.experts.{field}", value) if sparse else block

    return blocks(change)


def _without(block):
    return Block(block.attention, block.mlp, block.norm, block.epsilon)


_pre = blocks(_without)

FACTS = {
    "norms plus one": blocks(lambda block: dataclasses.replace(block, norm=OneRMSNorm)),
    "last norm plus one": lambda model, inputs: (
        edit(model, "norm", OneRMSNorm(model.norm.epsilon)),
        inputs,
    ),
    "neighbours are pairs": _scores(rotary=_interleave),
    "no positions": _scores(rotary=None),
    "scale": _scores(scale=0.2),
    "gelu": every("mlp.activation", gelu),
}

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
_SMALL = {"embed_tokens": 1e-2, "o_proj": 1e-2, "down_proj": 1e-2}


def _case(name, kind, facts=None, scales=None, **fields):
    return Case(
        name,
        functools.partial(_original, kind, **fields),
        _tokens,
        _logits,
        _our_logits,
        facts or {},
        scales or {},
    )


CASES = (
    _case(
        "llama",
        "Llama",
        FACTS
        | {
            "factor": _law(factor=2.0),
            "low": _law(low=1.5),
            "high": _law(high=5.0),
            "length trained on": _law(length=12),
            "theta": _theta(1e4, False),
        },
        rope_parameters={"rope_theta": 5e2, **_LLAMA3},
    ),
    _case(
        "llama_dynamic",  # And biases everywhere, a tied head, a small epsilon.
        "Llama",
        {
            "factor": _law(factor=3.0),
            "length trained on": _law(length=7),
            "epsilon": every("epsilon", 1e-6),
            "last epsilon": wrong("norm.epsilon", 1e-6),
        },
        _SMALL,
        hidden_size=16,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        max_position_embeddings=8,
        rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0},
    ),
    _case(
        "qwen2",
        "Qwen2",
        {
            "factor": _law(factor=2.0),
            "fast": _law(fast=0.5),
            "slow": _law(slow=0.1),
            "logits grow otherwise": _law(attention=1.0),
            "bounds between pairs": _law(whole=False),
            "a window more": _window(1),
            "a window less": _window(-1),
            "windows everywhere": _scores(window=5),
        },
        head_dim=None,
        hidden_size=18,
        intermediate_size=20,
        num_attention_heads=3,
        num_key_value_heads=1,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 1e2, "beta_fast": 0.15, "beta_slow": 0.02, **_YARN},
    ),
    _case(
        "mistral",
        "Mistral",
        {"a window more": _window(1), "a window less": _window(-1)},
        sliding_window=5,
    ),
    _case(
        "qwen3",
        "Qwen3",
        {
            "queries' norm plus one": every("attention.qk_norm", OneRMSNorm),
            "queries' epsilon": every("attention.epsilon", 1e-6),
        },
        {"q_proj": 1e-2, "k_proj": 1e-2},
        tie_word_embeddings=True,
        attention_bias=True,
        rms_norm_eps=1e-5,
    ),
    Case(
        "gpt2",
        _gpt2,
        _tokens,
        _logits,
        _our_logits,
        {
            "no mean is taken": blocks(lambda block: dataclasses.replace(block, norm=RMSNorm)),
            "gelu by erf": every("mlp.activation", gelu),
            "epsilon": every("epsilon", 1e-6),
            "last epsilon": wrong("norm.epsilon", 1e-6),
            "no positions": wrong("position", None),
        },
    ),
    _case(
        "gemma",
        "Gemma",
        {
            "plain norms": blocks(lambda block: dataclasses.replace(block, norm=RMSNorm)),
            "vectors as they are": wrong("table.scale", 1.0),
            "gelu by erf": every("mlp.activation", gelu),
        },
        hidden_size=16,
        intermediate_size=18,
        num_key_value_heads=1,
    ),
    _case(
        "gemma2",
        "Gemma2",
        {
            "plain norms": blocks(lambda block: dataclasses.replace(block, norm=RMSNorm)),
            "last norm plain": lambda model, inputs: (edit(model, "norm", RMSNorm()), inputs),
            "norms before alone": _pre,
            "no bound of attention": _scores(softcap=None),
            "another bound of attention": _scores(softcap=3.0),
            "no bound of logits": wrong("softcap", None),
            "scale by the head": _scores(scale=None),
            "vectors as they are": wrong("table.scale", 1.0),
            "a window more": _window(1),
            "a window less": _window(-1),
            "gelu by erf": every("mlp.activation", gelu),
        },
        num_hidden_layers=3,  # A round of two, and the first of it again.
        hidden_size=16,
        intermediate_size=18,
        sliding_window=5,
        query_pre_attn_scalar=9,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=4.0,
    ),
    _case(
        "gemma3",
        "Gemma3Text",
        {
            "theta of all": _theta(1e4, False),
            "theta of windows": _theta(5e2, True),
            "factor": _law(factor=3.0),
            "a window more": _window(1),
            "queries' norm plain": every("attention.qk_norm", RMSNorm),
            "scale by the head": _scores(scale=None),
            "vectors as they are": wrong("table.scale", 1.0),
        },
        hidden_size=16,
        intermediate_size=18,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=9,
        rope_parameters={
            "full_attention": {"rope_theta": 5e2, "rope_type": "linear", "factor": 2.0},
            "sliding_attention": {"rope_theta": 5e1, "rope_type": "default"},
        },
    ),
    _case(
        "mixtral",
        "Mixtral",
        {
            "weights as they are": every("mlp.experts.renormalise", False),
            "one expert more": every("mlp.experts.top_k", 3),
            "gelu": every("mlp.activation", gelu),
        },
        hidden_size=16,
        intermediate_size=10,
        num_local_experts=3,
        num_experts_per_tok=2,
    ),
    _case(
        "qwen3_moe",
        "Qwen3Moe",
        {
            "weights sum to one": _moe("renormalise", True),
            "one expert less": _moe("top_k", 1),
        },
        hidden_size=16,
        num_hidden_layers=3,
        intermediate_size=12,
        moe_intermediate_size=6,
        mlp_only_layers=[0],
        num_experts=3,
        num_experts_per_tok=2,
        head_dim=4,
        tie_word_embeddings=True,
    ),
)
