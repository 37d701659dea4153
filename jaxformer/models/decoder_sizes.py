"""Decoders by their usual names, with the numbers of their releases."""

import functools
from typing import Any

from jaxformer.layers.block import SandwichBlock
from jaxformer.layers.moe import Experts
from jaxformer.layers.norm import LayerNorm, OneRMSNorm
from jaxformer.models.decoder import Decoder
from jaxformer.ops.activation import gelu_tanh
from jaxformer.ops.rotary_scaling import Linear, Llama3, Rotary

Numbers = dict[str, Any]


def _gpt(width: int, depth: int, num_heads: int, length: int = 1024, **more) -> Numbers:
    return {
        "vocab": 50257,
        "width": width,
        "depth": depth,
        "mlp_dim": 4 * width,
        "num_heads": num_heads,
        "length": length,
        "positions": "learned",
        "norm": LayerNorm,
        "epsilon": 1e-5,
        "activation": gelu_tanh,
        "gated": False,
        "use_bias": True,
        **more,
    }


def _llama(
    width: int, depth: int, num_heads: int, num_kv_heads: int, mlp_dim: int, **more
) -> Numbers:
    return {
        "vocab": 32000,
        "width": width,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "length": 4096,
        "epsilon": 1e-5,
        "tied": False,
        **more,
    }


_llama3 = functools.partial(
    _llama, vocab=128256, length=131072, rotary=Rotary(5e5, Llama3(8.0, 8192))
)
_mistral = functools.partial(_llama, length=32768)
_qwen25 = functools.partial(
    _llama, length=32768, rotary=Rotary(1e6), epsilon=1e-6, qkv_bias=True
)
_qwen25_large = functools.partial(_qwen25, vocab=152064, length=131072, epsilon=1e-5)
_qwen3 = functools.partial(
    _llama,
    vocab=151936,
    length=40960,
    rotary=Rotary(1e6),
    epsilon=1e-6,
    qk_norm=True,
    head_dim=128,
)


def _gemma(width: int, depth: int, num_heads: int, num_kv_heads: int, mlp_dim: int, **more):
    return {
        "width": width,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "block": SandwichBlock,
        "norm": OneRMSNorm,
        "activation": gelu_tanh,
        "embed_scale": width**0.5,
        **more,
    }


_gemma2 = functools.partial(
    _gemma,
    vocab=256000,
    length=8192,
    windows=(4096, None),
    softcap=50.0,
    final_softcap=30.0,
)


def _gemma3(*sizes: int, window: int = 1024, **more) -> Numbers:
    return _gemma(
        *sizes,
        **{
            "vocab": 262208,
            "length": 131072,
            "windows": (window,) * 5 + (None,),
            "rotary": Rotary(1e6, Linear(8.0)),
            "local_rotary": Rotary(1e4),
            "qk_norm": True,
            "head_dim": 256,
            "scale": 256**-0.5,
            **more,
        },
    )


SIZES: dict[str, Numbers] = {
    "gpt2": _gpt(768, 12, 12),
    "gpt2-medium": _gpt(1024, 24, 16),
    "gpt2-large": _gpt(1280, 36, 20),
    "gpt2-xl": _gpt(1600, 48, 25),
    # Its layers took sparse and full attention in turn; here all are full.
    "gpt3-175b": _gpt(12288, 96, 96, 2048),
    "llama2-7b": _llama(4096, 32, 32, 32, 11008),
    "llama2-13b": _llama(5120, 40, 40, 40, 13824),
    "llama2-70b": _llama(8192, 80, 64, 8, 28672),
    "llama3-8b": _llama(4096, 32, 32, 8, 14336, vocab=128256, length=8192, rotary=Rotary(5e5)),
    "llama3-70b": _llama(8192, 80, 64, 8, 28672, vocab=128256, length=8192, rotary=Rotary(5e5)),
    "llama3.1-8b": _llama3(4096, 32, 32, 8, 14336),
    "llama3.1-70b": _llama3(8192, 80, 64, 8, 28672),
    "llama3.1-405b": _llama3(16384, 126, 128, 8, 53248),
    "mistral-7b": _mistral(4096, 32, 32, 8, 14336, windows=(4096,)),
    "mixtral-8x7b": _mistral(4096, 32, 32, 8, 14336, rotary=Rotary(1e6), experts=Experts(8, 2)),
    "mixtral-8x22b": _mistral(
        6144,
        56,
        48,
        8,
        16384,
        vocab=32768,
        length=65536,
        rotary=Rotary(1e6),
        experts=Experts(8, 2),
    ),
    "qwen2.5-0.5b": _qwen25(896, 24, 14, 2, 4864, vocab=151936, tied=True),
    "qwen2.5-1.5b": _qwen25(1536, 28, 12, 2, 8960, vocab=151936, tied=True),
    "qwen2.5-3b": _qwen25(2048, 36, 16, 2, 11008, vocab=151936, tied=True),
    "qwen2.5-7b": _qwen25(3584, 28, 28, 4, 18944, vocab=152064, length=131072),
    "qwen2.5-14b": _qwen25_large(5120, 48, 40, 8, 13824),
    "qwen2.5-32b": _qwen25_large(5120, 64, 40, 8, 27648),
    "qwen2.5-72b": _qwen25_large(8192, 80, 64, 8, 29568),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288),
    "qwen3-14b": _qwen3(5120, 40, 40, 8, 17408),
    "qwen3-32b": _qwen3(5120, 64, 64, 8, 25600),
    "qwen3-30b-a3b": _qwen3(2048, 48, 32, 4, 768, experts=Experts(128, 8)),
    "qwen3-235b-a22b": _qwen3(4096, 94, 64, 4, 1536, experts=Experts(128, 8)),
    "gemma2-2b": _gemma2(2304, 26, 8, 4, 9216, head_dim=256, scale=256**-0.5),
    "gemma2-9b": _gemma2(3584, 42, 16, 8, 14336, head_dim=256, scale=256**-0.5),
    "gemma2-27b": _gemma2(4608, 46, 32, 16, 36864, head_dim=128, scale=144**-0.5),
    "gemma3-1b": _gemma3(
        1152, 26, 4, 1, 6912, vocab=262144, length=32768, window=512, rotary=Rotary(1e6)
    ),
    "gemma3-4b": _gemma3(2560, 34, 8, 4, 10240),
    "gemma3-12b": _gemma3(3840, 48, 16, 8, 15360),
    "gemma3-27b": _gemma3(5376, 62, 32, 16, 21504, head_dim=128, scale=168**-0.5),
}


def named(name: str, **fields) -> Decoder:
    """A decoder by its usual name: `named("llama3-8b")`; other fields as given.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in SIZES:
        raise ValueError(f"{name!r} is no decoder; known are {', '.join(SIZES)}")
    return Decoder(**{**SIZES[name], **fields})
