"""`GPT2LMHeadModel` of transformers, whose matrices lie as `[in, out]`."""

from typing import Any

from jaxformer.convert import language, parts
from jaxformer.convert.config import activation_of, name_of, number
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention, Scores
from jaxformer.layers.block import Block, Mlp
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.text import LearnedPositions, TokenTable
from jaxformer.models.decoder import LanguageModel

TABLE = "transformer.wte.weight"


def _model(config: dict[str, Any], names: set[str], dtype: Any) -> LanguageModel:
    language.refuse(
        config,
        quantization_config=None,
        add_cross_attention=False,
        scale_attn_by_inverse_layer_idx=False,
    )
    D, N = number(config, "n_embd", 768), number(config, "n_head", 12)
    if D % N:
        raise InputError(f"config.json: n_head={N} must divide n_embd={D}")
    epsilon = number(config, "layer_norm_epsilon", 1e-5)
    length, vocab = number(config, "n_positions", 1024), number(config, "vocab_size", 50257)
    scores = Scores(scale=None if config.get("scale_attn_weights", True) else 1.0)
    activation = activation_of(config, "activation_function", "gelu_new")

    def block() -> Block:
        return Block(
            Attention(N, D // N, N, use_bias=True, scores=scores, dtype=dtype),
            Mlp(number(config, "n_inner", 4 * D), activation, use_bias=True, dtype=dtype),
            LayerNorm,
            epsilon,
        )

    return LanguageModel(
        TokenTable(vocab, D, dtype=dtype),
        language.arrange([block() for _ in range(number(config, "n_layer", 12))]),
        LayerNorm(epsilon),
        language.head_of(config, names, vocab, True, dtype),
        LearnedPositions(length, D),
        length,
    )


def _config(model: Any) -> dict[str, Any] | None:
    blocks = language.blocks_of(model)
    if not blocks or not isinstance(model.position, LearnedPositions):
        return None
    attention, mlp = blocks[0].attention, blocks[0].mlp
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.table.vocab,
        "n_positions": model.position.length,
        "n_embd": model.table.width,
        "n_layer": len(blocks),
        "n_head": attention.num_heads,
        "n_inner": mlp.width,
        "activation_function": name_of(mlp.activation),
        "layer_norm_epsilon": blocks[0].epsilon,
        "scale_attn_weights": attention.scores.scale != 1,
        "tie_word_embeddings": model.head is None,
    }


def _entries(model: Any) -> list[Entry]:
    found = [
        Entry("table/embedding", TABLE, "V D -> V D"),
        Entry("position/position/embedding", "transformer.wpe.weight", "T D -> T D"),
        *parts.norm("norm", "transformer.ln_f"),
    ]
    if model.head is not None:
        found.append(Entry("head/kernel", language.HEAD, "V D -> D V"))
    for path, theirs, block, entry in language.places(model.stack, "transformer.h"):
        sizes = {"N": block.attention.num_heads}
        for i, name in enumerate(("query", "key", "value")):
            ours, tensor = f"{path}/attention/{name}", f"{theirs}.attn.c_attn"
            alike = {"sizes": sizes, "part": (i, 3), **entry}
            found += [
                Entry(
                    f"{ours}/kernel", f"{tensor}.weight", "D (N H) -> D N H", axis=1, **alike
                ),
                Entry(f"{ours}/bias", f"{tensor}.bias", "(N H) -> N H", **alike),
            ]
        ours, tensor = f"{path}/attention/out", f"{theirs}.attn.c_proj"
        found += [
            Entry(f"{ours}/kernel", f"{tensor}.weight", "(N H) D -> N H D", sizes, **entry),
            Entry(f"{ours}/bias", f"{tensor}.bias", "D -> D", **entry),
            *parts.norm(f"{path}/attention_norm", f"{theirs}.ln_1", **entry),
            *parts.norm(f"{path}/mlp_norm", f"{theirs}.ln_2", **entry),
        ]
        for name, tensor in (("up", "c_fc"), ("down", "c_proj")):
            ours, tensor = f"{path}/mlp/{name}", f"{theirs}.mlp.{tensor}"
            found += [
                Entry(f"{ours}/kernel", f"{tensor}.weight", "I O -> I O", **entry),
                Entry(f"{ours}/bias", f"{tensor}.bias", "O -> O", **entry),
            ]
    return found


GPT2 = Family(
    name="gpt2",
    model=_model,
    config=_config,
    entries=_entries,
    inputs=language.inputs,
    rename=((r"^(?!transformer\.|lm_head\.)", "transformer."),),
    ignore=(r"\.attn\.(masked_)?bias$",),  # The causal mask.
    unpack=language.unpack_head(TABLE, tied=True),
)
