"""`OPTForCausalLM` of transformers, with norms before each branch and no narrower words."""

from typing import Any

from jaxformer.convert import language, parts
from jaxformer.convert.config import activation_of, name_of, number
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.text import TokenTable
from jaxformer.models.decoder import LanguageModel
from jaxformer.models.opt import ShiftedPositions

_MODEL = "model.decoder"
_TABLE, _EPSILON = f"{_MODEL}.embed_tokens.weight", 1e-5
_NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


def _model(config: dict[str, Any], names: set[str], dtype: Any) -> LanguageModel:
    D, N = number(config, "hidden_size", 768), number(config, "num_attention_heads", 12)
    if D % N:
        raise InputError(f"config.json: num_attention_heads={N} must divide hidden_size={D}")
    narrow = config.get("word_embed_proj_dim")
    language.refuse(
        {**config, "word_embed_proj_dim": D if narrow is None else narrow},
        quantization_config=None,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        enable_bias=True,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=D,
    )
    length, vocab = (
        number(config, "max_position_embeddings", 2048),
        number(config, "vocab_size", 50272),
    )
    width = number(config, "ffn_dim", 3072)
    activation = activation_of(config, "activation_function", "relu")

    def block() -> Block:
        return Block(
            Attention(N, D // N, N, use_bias=True, dtype=dtype),
            Mlp(width, activation, use_bias=True, dtype=dtype),
            LayerNorm,
            _EPSILON,
        )

    return LanguageModel(
        TokenTable(vocab, D, dtype=dtype),
        language.arrange([block() for _ in range(number(config, "num_hidden_layers", 12))]),
        LayerNorm(_EPSILON),
        language.head_of(config, names, vocab, True, dtype),
        ShiftedPositions(length, D),
        length,
    )


def _config(model: Any) -> dict[str, Any] | None:
    blocks = language.blocks_of(model)
    if not blocks or not isinstance(model.position, ShiftedPositions):
        return None
    attention, mlp = blocks[0].attention, blocks[0].mlp
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": model.table.vocab,
        "max_position_embeddings": model.position.length,
        "hidden_size": model.table.width,
        "word_embed_proj_dim": model.table.width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": attention.num_heads,
        "ffn_dim": mlp.width,
        "activation_function": name_of(mlp.activation),
        "do_layer_norm_before": True,
        "tie_word_embeddings": model.head is None,
    }


def _entries(model: Any) -> list[Entry]:
    positions = f"{_MODEL}.embed_positions.weight"
    found = [
        Entry("table/embedding", _TABLE, "V D -> V D"),
        Entry("position/position/embedding", positions, "T D -> T D"),
        *parts.norm("norm", f"{_MODEL}.final_layer_norm"),
    ]
    if model.head is not None:
        found.append(Entry("head/kernel", language.HEAD, "V D -> D V"))
    for path, theirs, block, entry in language.places(model.stack, f"{_MODEL}.layers"):
        heads, own = block.attention.num_heads, f"{theirs}.self_attn"
        found += [
            *parts.attention(f"{path}/attention", own, _NAMES, heads, **entry),
            *parts.norm(f"{path}/attention_norm", f"{own}_layer_norm", **entry),
            *parts.norm(f"{path}/mlp_norm", f"{theirs}.final_layer_norm", **entry),
            *parts.linear(f"{path}/mlp/up", f"{theirs}.fc1", **entry),
            *parts.linear(f"{path}/mlp/down", f"{theirs}.fc2", **entry),
        ]
    return found


OPT = Family(
    name="opt",
    model=_model,
    config=_config,
    entries=_entries,
    inputs=language.inputs,
    rename=((r"^(?:model\.)?decoder\.", f"{_MODEL}."),),
    unpack=language.unpack_head(_TABLE, tied=True),
)
