"""`LlamaForCausalLM` of transformers, and those that differ from it in a fact or two.

They are Mistral (windows), Qwen 2 and 2.5 (biases of queries, keys and values; windows in
some layers) and Qwen 3 (norms of queries and keys). Those that unmask are in `unmask`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxformer.convert import language
from jaxformer.convert.engine import Family
from jaxformer.convert.rotary import rotary_of
from jaxformer.layers.attention import Scores
from jaxformer.layers.block import Block
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.decoder import LanguageModel


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family: its names, what its config's class takes, and what its layers have."""

    name: str
    architecture: str
    vocab: int = 32000
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int = 11008
    bias: bool | None = None  # of queries, keys and values alone; None: by attention_bias.
    qk_norm: type[RMSNorm] | None = None
    causal: bool = True

    def windows(self, config: Mapping[str, Any], depth: int) -> list[int | None]:
        """Llama has none."""
        return [None] * depth

    def told(self, model: Any, blocks: list[Any]) -> dict[str, Any]:
        """What a config says of them, and what else is the family's own."""
        return {}

    def attention(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Options of `Attention`."""
        bias = bool(config.get("attention_bias", False)) if self.bias is None else self.bias
        out = None if self.bias is None else False
        return {"use_bias": bias, "out_bias": out, "qk_norm": self.qk_norm}

    def model(self, config: dict[str, Any], names: set[str], dtype: Any) -> LanguageModel:
        """The model of a config."""
        rotary = rotary_of(config)

        def block(window: int | None) -> Block:
            scores, options = Scores(rotary, window), self.attention(config)
            options |= {"kv_heads": self.kv_heads, "head_dim": self.head_dim}
            return Block(
                language.attention_of(config, scores, dtype, **options),
                language.mlp_of(config, self.mlp_dim, dtype),
                RMSNorm,
                language.epsilon_of(config),
            )

        windows = self.windows(config, language.depth_of(config))
        blocks = [block(window) for window in windows]
        own: dict[str, Any] = {"vocab": self.vocab, "causal": self.causal}
        return language.assemble(config, names, blocks, rotary, dtype, **own)

    def config(self, model: Any) -> dict[str, Any] | None:
        """The config of a model."""
        blocks = language.blocks_of(model)
        if not blocks:
            return None
        first = blocks[0]
        own = {"attention_bias": first.attention.use_bias} if self.bias is None else {}
        if self.name == "llama":
            own |= {"mlp_bias": first.mlp.use_bias}
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            **language.told(model, blocks),
            "intermediate_size": first.mlp.width,
            **own,
            **self.told(model, blocks),
            **language.told_rotary(model, first),
        }

    def family(self) -> Family:
        """What the engine takes."""
        return Family(
            name=self.name,
            model=self.model,
            config=self.config,
            entries=language.entries,
            inputs=language.inputs,
            rename=language.RENAME,
            ignore=language.IGNORE,
            unpack=language.unpack_head("model.embed_tokens.weight", tied=False),
        )


class _Mistral(Kind):
    """All layers have one window, or none."""

    def windows(self, config, depth):
        return [language.window_of(config, 4096)] * depth

    def told(self, model, blocks):
        return {"sliding_window": blocks[0].attention.scores.window}


class _Qwen(Kind):
    """Windows, if they are used, from layer `max_window_layers` on or by `layer_types`."""

    def windows(self, config, depth):
        used = bool(config.get("use_sliding_window", False))
        window = language.window_of(config, 4096) if used else None
        first = config.get("max_window_layers", 28)
        return language.windows_of(config, depth, window, lambda i: i >= first)

    def told(self, model, blocks):
        found = language.told_windows(blocks)
        return found | {"use_sliding_window": found["sliding_window"] is not None}


QWEN: dict[str, Any] = {"vocab": 151936, "mlp_dim": 22016, "kv_heads": 32}
LLAMA = Kind("llama", "LlamaForCausalLM").family()
MISTRAL = _Mistral(
    "mistral", "MistralForCausalLM", kv_heads=8, mlp_dim=14336, bias=False
).family()
QWEN2_KIND = _Qwen("qwen2", "Qwen2ForCausalLM", bias=True, **QWEN)
QWEN3_KIND = _Qwen("qwen3", "Qwen3ForCausalLM", head_dim=128, qk_norm=RMSNorm, **QWEN)
QWEN2, QWEN3 = QWEN2_KIND.family(), QWEN3_KIND.family()
