"""LLaDA and Dream: Llama and Qwen 2 of transformers that see both ways, as their files are.

The originals' own code is on the hub alone; what they compute is what transformers' classes
do without the causal mask. Names and words of configs are written out here once more.
"""

import functools
import json
import pathlib
from typing import Any

import jax.numpy as jnp

from jaxformer.layers.block import Mlp
from jaxformer.models.mdlm import denoiser
from jaxformer.ops.activation import silu
from tests.parity.case import Case, edit, wrong
from tests.parity.language import FACTS, TINY, blocks, every

LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 22,
    "vocab_size": 17,
    "embedding_size": 19,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_theta": 5e2,
    "max_sequence_length": 16,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
    "mask_token_id": 16,
}
LLAMA = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 22,
    "vocab_size": 19,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_theta": 5e2, "rope_type": "default"},
}
NAMES = [
    ("model.embed_tokens.", "model.transformer.wte."),
    ("model.norm.", "model.transformer.ln_f."),
    ("lm_head.", "model.transformer.ff_out."),
    ("model.layers.", "model.transformer.blocks."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ff_norm."),
    (".self_attn.o_proj.", ".attn_out."),
    (".self_attn.", "."),
    (".mlp.gate_proj.", ".ff_proj."),
    (".mlp.up_proj.", ".up_proj."),
    (".mlp.down_proj.", ".ff_out."),
]
DREAM = TINY | {
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "hidden_size": 24,
    "head_dim": 6,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e2,
    "rope_scaling": None,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "mask_token_id": 18,
}
QWEN2 = {k: v for k, v in DREAM.items() if k not in ("model_type", "rope_scaling")}
QWEN2 |= {"rope_parameters": {"rope_theta": 1e2, "rope_type": "default"}}


def _original(kind: str, fields: dict[str, Any], config: dict[str, Any], names=()):
    """One of transformers that saves and loads under other names, with another config."""
    import safetensors.torch
    import transformers

    theirs: Any = getattr(transformers, f"{kind}ForCausalLM")
    settings = getattr(transformers, f"{kind}Config")(**fields)

    def renamed(name):
        for old, new in names:
            name = name.replace(old, new)
        return name

    class Original(theirs):
        def save_pretrained(self, directory):
            path = pathlib.Path(directory)
            path.mkdir(parents=True, exist_ok=True)
            tensors = {renamed(k): x.contiguous() for k, x in self.state_dict().items()}
            safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
            (path / "config.json").write_text(json.dumps(config, indent=2))

        @classmethod
        def from_pretrained(cls, directory, *, output_loading_info):
            found = safetensors.torch.load_file(pathlib.Path(directory) / "model.safetensors")
            module = cls(settings)
            own = {renamed(name): name for name in module.state_dict()}
            tensors = {own.get(name, name): x for name, x in found.items()}
            told = module.load_state_dict(tensors, strict=False)
            return module, {"missing": told.missing_keys, "unknown": told.unexpected_keys}

    return Original(settings)


def _tokens(draw):
    return {"tokens": draw.integers(3, 19, size=(2, 12)).astype("int32")}


def _both_ways(module, inputs):
    import torch

    B, T = inputs["tokens"].shape
    seen = torch.zeros(B, 1, T, T)  # Added to the scores.
    found = module(inputs["tokens"].long(), attention_mask=seen, use_cache=False)
    return {"logits": found.logits}


def _shifted(module, inputs):
    import torch

    logits = _both_ways(module, inputs)["logits"]
    return {"logits": torch.cat([logits[:, :1], logits[:, :-1]], dim=1)}


def _ours(model, variables, inputs, shift=False):
    shift = shift != ("shifted otherwise" in inputs)
    denoise = denoiser(model, variables["params"], shift=shift)
    return {"logits": denoise(inputs["tokens"], jnp.ones(2))}


def _unshifted(model, inputs):
    return model, inputs | {"shifted otherwise": jnp.ones(())}


class GatedByUp(Mlp):
    """The other half is activated, which is wrong."""

    def __call__(self, x, *, train=False):
        swapped = {"gate": "up", "up": "gate"}
        params = self.variables["params"]
        params = {swapped.get(name, name): value for name, value in params.items()}
        plain = Mlp(self.width, silu, True, dtype=self.dtype, parent=None)
        return plain.apply({"params": params}, x)


def _swap(block):
    mlp = block.mlp
    return edit(block, "mlp", GatedByUp(mlp.width, silu, True, dtype=mlp.dtype))


_SMALL = {"embed_tokens": 1e-2, "o_proj": 1e-2, "down_proj": 1e-2}
_CAUSAL = wrong("causal", True)

CASES = (
    Case(
        "llada",
        functools.partial(_original, "Llama", LLAMA, LLADA, NAMES),
        _tokens,
        _both_ways,
        _ours,
        {
            **{k: FACTS[k] for k in ("neighbours are pairs", "no positions", "gelu")},
            "causal": _CAUSAL,
            "the other half is activated": blocks(_swap),
            "epsilon": every("epsilon", 1e-6),
            "last epsilon": wrong("norm.epsilon", 1e-6),
            "shifted": _unshifted,
        },
        _SMALL,
    ),
    Case(
        "dream",
        functools.partial(_original, "Qwen2", QWEN2, DREAM),
        _tokens,
        _shifted,
        functools.partial(_ours, shift=True),
        {
            "causal": _CAUSAL,
            "not shifted": _unshifted,
            "no biases": every("attention.use_bias", False),
        },
    ),
)
