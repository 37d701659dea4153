"""Mixtures of experts of transformers: `MixtralForCausalLM` and `Qwen3MoeForCausalLM`.

On the hub each expert has tensors of its own, and so has what transformers 5 saves. In its
memory those of all experts are one, gate and up beside each other; files of that are read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxformer.convert import language, parts
from jaxformer.convert.config import activation_of, number
from jaxformer.convert.engine import Entry, Family
from jaxformer.convert.files import Stored
from jaxformer.convert.rotary import rotary_of
from jaxformer.errors import InputError
from jaxformer.layers.attention import Scores
from jaxformer.layers.block import Block, Mlp
from jaxformer.layers.moe import Experts, Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.decoder import LanguageModel


@dataclasses.dataclass(frozen=True)
class _Names:
    """What the parts of a mixture are called, after a layer's name."""

    mlp: str
    gate: str
    up: str
    down: str

    def entries(self, moe: Moe, ours: str, theirs: str, **entry) -> list[Entry]:
        """The table of one mixture."""
        found = parts.linear(f"{ours}/router", f"{theirs}.{self.mlp}.gate", False, **entry)
        for name in ("gate", "up", "down"):
            for i in range(moe.experts.count):
                tensor = f"{theirs}.{self.mlp}.experts.{i}.{getattr(self, name)}.weight"
                found.append(
                    Entry(f"{ours}/{name}/kernel", tensor, "O I -> I O", at=i, **entry)
                )
        return found

    def unpack(self, tensors: dict[str, Stored]) -> dict[str, Stored]:
        """Experts that are one tensor, as one for each: parts of the file, none is read."""
        found = {}
        for name, stored in tensors.items():
            layer, _, kind = name.rpartition(".mlp.experts.")
            if kind not in ("gate_up_proj", "down_proj") or len(stored.shape) != 3:
                found[name] = stored
                continue
            fused = (self.gate, self.up) if kind == "gate_up_proj" else (self.down,)
            parts_of = stored.split(stored.shape[0] * len(fused))
            for i, part in enumerate(parts_of):
                expert, which = divmod(i, len(fused))
                found[f"{layer}.{self.mlp}.experts.{expert}.{fused[which]}.weight"] = part
        return found


_MIXTRAL = _Names("block_sparse_moe", "w1", "w3", "w2")
_QWEN = _Names("mlp", "gate_proj", "up_proj", "down_proj")


def _experts(config: Mapping[str, Any], count: int, top_k: int, **options) -> Experts:
    """The experts of a config, which has their number under one of two names."""
    name = "num_local_experts" if "num_local_experts" in config else "num_experts"
    count, top_k = number(config, name, count), number(config, "num_experts_per_tok", top_k)
    if top_k > count:
        raise InputError(
            f"config.json: num_experts_per_tok={top_k} must be {name}={count} or less"
        )
    return Experts(count, top_k, **options)


def _mixtral(config: dict[str, Any], names: set[str], dtype: Any) -> LanguageModel:
    rotary, window = rotary_of(config, 1e6), language.window_of(config, None)
    epsilon = language.epsilon_of(config, 1e-5)

    def block() -> Block:
        scores = Scores(rotary, window)
        return Block(
            language.attention_of(config, scores, dtype, kv_heads=8),
            Moe(
                number(config, "intermediate_size", 14336),
                _experts(config, 8, 2),
                activation_of(config, "hidden_act", "silu"),
                dtype=dtype,
            ),
            RMSNorm,
            epsilon,
        )

    blocks = [block() for _ in range(language.depth_of(config))]
    return language.assemble(config, names, blocks, rotary, dtype, epsilon=1e-5)


def _mixtral_config(model: Any) -> dict[str, Any] | None:
    blocks = language.blocks_of(model, (Moe,))
    if not blocks:
        return None
    moe = blocks[0].mlp
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **language.told(model, blocks),
        "intermediate_size": moe.width,
        "num_local_experts": moe.experts.count,
        "num_experts_per_tok": moe.experts.top_k,
        "sliding_window": blocks[0].attention.scores.window,
        **language.told_rotary(model, blocks[0]),
    }


def _qwen(config: dict[str, Any], names: set[str], dtype: Any) -> LanguageModel:
    rotary = rotary_of(config)
    used = bool(config.get("use_sliding_window", False))
    window = language.window_of(config, 4096) if used else None
    dense, step = config.get("mlp_only_layers") or [], number(config, "decoder_sparse_step", 1)
    renormalise = bool(config.get("norm_topk_prob", False))

    def block(i: int) -> Block:
        if i in dense or (i + 1) % step:
            mlp = language.mlp_of(config, 6144, dtype)
        else:
            mlp = Moe(
                number(config, "moe_intermediate_size", 768),
                _experts(config, 128, 8, renormalise=renormalise),
                activation_of(config, "hidden_act", "silu"),
                dtype=dtype,
            )
        options = {"kv_heads": 4, "use_bias": bool(config.get("attention_bias", False))}
        scores = Scores(rotary, window)
        attention = language.attention_of(config, scores, dtype, qk_norm=RMSNorm, **options)
        return Block(attention, mlp, RMSNorm, language.epsilon_of(config))

    blocks = [block(i) for i in range(language.depth_of(config, 24))]
    return language.assemble(config, names, blocks, rotary, dtype, vocab=151936)


def _qwen_config(model: Any) -> dict[str, Any] | None:
    blocks = language.blocks_of(model, (Mlp, Moe))
    sparse = [block.mlp for block in blocks if type(block.mlp) is Moe]
    if not sparse:
        return None
    dense = [i for i, block in enumerate(blocks) if type(block.mlp) is Mlp]
    moe, attention = sparse[0], blocks[0].attention
    width = {"intermediate_size": blocks[dense[0]].mlp.width} if dense else {}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **language.told(model, blocks),
        **width,
        "moe_intermediate_size": moe.width,
        "num_experts": moe.experts.count,
        "num_experts_per_tok": moe.experts.top_k,
        "norm_topk_prob": moe.experts.renormalise,
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "attention_bias": attention.use_bias,
        "use_sliding_window": attention.scores.window is not None,
        "sliding_window": attention.scores.window,
        **language.told_rotary(model, blocks[0]),
    }


def _family(name: str, model: Any, config: Any, names: _Names, rename=()) -> Family:
    tied = language.unpack_head("model.embed_tokens.weight", tied=False)
    return Family(
        name=name,
        model=model,
        config=config,
        entries=lambda model: language.entries(model, names.entries),
        inputs=language.inputs,
        rename=(*language.RENAME, *rename),
        ignore=language.IGNORE,
        unpack=lambda config, tensors: tied(config, names.unpack(tensors)),
    )


MIXTRAL = _family(
    "mixtral",
    _mixtral,
    _mixtral_config,
    _MIXTRAL,
    # What transformers 5 calls the router in memory.
    ((r"\.mlp\.gate\.weight$", ".block_sparse_moe.gate.weight"),),
)
QWEN3_MOE = _family("qwen3_moe", _qwen, _qwen_config, _QWEN)
