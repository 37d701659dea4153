"""What the language models of transformers share: how their configs and tensors are read.

Llama's names are those of all families but GPT-2's.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.convert import parts
from jaxformer.convert.config import activation_of, name_of, number
from jaxformer.convert.engine import Entry
from jaxformer.convert.files import Stored
from jaxformer.convert.rotary import length_of, told_length, told_of
from jaxformer.convert.stacks import arrange, layers_of
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention, Scores
from jaxformer.layers.block import Block, Mlp, SandwichBlock
from jaxformer.layers.deep import DeepBlock
from jaxformer.layers.einsum import Einsum
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.text import TokenTable
from jaxformer.models.decoder import LanguageModel
from jaxformer.ops.rotary_scaling import Rotary

HEAD = "lm_head.weight"
NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
SLIDING, FULL = "sliding_attention", "full_attention"
# The norms of a block, ours and theirs.
PRE = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
SANDWICH = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
# A model without its head is saved without this before its names.
RENAME = ((r"^(?!model\.|lm_head\.)", "model."),)
IGNORE = (r"rotary_emb\.inv_freq$",)


def attention_of(
    config: Mapping[str, Any],
    scores: Scores,
    dtype: Any,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    **options,
) -> Attention:
    """Attention of a config's sizes.

    Args:
      config: theirs.
      scores: how its tokens look at each other.
      dtype: what is computed in.
      kv_heads: what the config's class takes; as many as heads if not given.
      head_dim: what the config's class takes; the width by the heads if not given.
      **options: of `Attention`.
    """
    D, N = number(config, "hidden_size", 4096), number(config, "num_attention_heads", 32)
    K = number(config, "num_key_value_heads", kv_heads or N)
    if config.get("head_dim") is None and head_dim is None and D % N:
        raise InputError(
            f"config.json: num_attention_heads={N} must divide hidden_size={D}, or give "
            "head_dim"
        )
    H = number(config, "head_dim", head_dim or D // N)
    if N % K or H % 2:
        raise InputError(
            f"config.json: num_attention_heads={N} must be a multiple of "
            f"num_key_value_heads={K}, and head_dim={H} even"
        )
    return Attention(N, H, K, scores=scores, epsilon=epsilon_of(config), dtype=dtype, **options)


def mlp_of(
    config: Mapping[str, Any],
    width: int,
    dtype: Any,
    *,
    activation: str = "hidden_act",
    default: str = "silu",
) -> Mlp:
    """The gated MLP of a config, whose class takes `width` and the activation `default`.

    `activation` is the name under which the config has that.
    """
    bias = bool(config.get("mlp_bias", False))
    F = number(config, "intermediate_size", width)
    return Mlp(F, activation_of(config, activation, default), True, bias, dtype=dtype)


def epsilon_of(config: Mapping[str, Any], default: float = 1e-6) -> float:
    """Of all norms."""
    return number(config, "rms_norm_eps", default)


def depth_of(config: Mapping[str, Any], default: int = 32) -> int:
    """How many layers there are."""
    return number(config, "num_hidden_layers", default)


def windows_of(
    config: Mapping[str, Any], depth: int, window: int | None, local: Callable[[int], bool]
) -> list[int | None]:
    """The window of each layer: `window` for those that `layer_types` calls sliding.

    Where the config has no `layer_types`, `local` says of a layer's number whether it is.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if window is not None and local(i) else FULL for i in range(depth)]
    if not isinstance(kinds, list) or len(kinds) != depth or {*kinds} - {SLIDING, FULL}:
        raise InputError(
            f"config.json: layer_types must be {depth} of {SLIDING} and {FULL}, one a layer"
        )
    if SLIDING in kinds and window is None:
        raise InputError(f"config.json: layer_types has {SLIDING}, but there is no window")
    return [window if kind == SLIDING else None for kind in kinds]


def window_of(config: Mapping[str, Any], default: int | None) -> int | None:
    """`sliding_window`: how many tokens one sees, itself among them; null is all."""
    if config.get("sliding_window", default) is None:
        return None
    return number(config, "sliding_window", default or 1)


def assemble(
    config: Mapping[str, Any],
    names: set[str],
    blocks: Sequence[nn.Module],
    rotary: Rotary,
    dtype: Any,
    *,
    vocab: int = 32000,
    tied: bool = False,
    scaled: bool = False,
    norm: Callable[..., nn.Module] = RMSNorm,
    epsilon: float = 1e-6,
    **options,
) -> LanguageModel:
    """The model of a config's blocks.

    Args:
      config: theirs.
      names: what is in the file: a head that is tied is not.
      blocks: one a layer.
      rotary: of the layers that see all.
      dtype: what is computed in.
      vocab: what the config's class takes.
      tied: what the config's class takes.
      scaled: whether tokens' vectors are multiplied by the root of the width.
      norm: the last one.
      epsilon: what the config's class takes.
      **options: of `LanguageModel`.
    """
    refuse(config, quantization_config=None)
    D, V = number(config, "hidden_size", 4096), number(config, "vocab_size", vocab)
    return LanguageModel(
        TokenTable(V, D, D**0.5 if scaled else 1.0, dtype),
        arrange(blocks),
        norm(epsilon_of(config, epsilon)),
        head_of(config, names, V, tied, dtype),
        length=options.pop("length", length_of(config, rotary)),
        **options,
    )


def head_of(
    config: Mapping[str, Any], names: set[str], vocab: int, tied: bool, dtype: Any
) -> Einsum | None:
    """A head of its own, where the config says so or the file has one that `unpack` left."""
    if bool(config.get("tie_word_embeddings", tied)) and HEAD not in names:
        return None
    return Einsum("BTD,DV->BTV", {"V": vocab}, dtype=dtype)


def refuse(config: Mapping[str, Any], **known: Any) -> None:
    """Raises InputError for a field that is there and says other than what is `known`."""
    for name, value in known.items():
        if config.get(name, value) != value:
            raise InputError(
                f"config.json: {name}={config[name]!r} is not supported; it must be {value!r}"
            )


def unpack_head(table: str, tied: bool) -> Callable[..., dict[str, Stored]]:
    """Takes away a head that is tied, where it is in the file all the same.

    One that is tied by the config but is another than the table stays: as transformers
    does, the file is believed.
    """

    def unpack(config: Mapping[str, Any], tensors: dict[str, Stored]) -> dict[str, Stored]:
        if not config.get("tie_word_embeddings", tied) or not {HEAD, table} <= tensors.keys():
            return tensors
        if not same(tensors[HEAD], tensors[table]):
            return tensors
        return {name: x for name, x in tensors.items() if name != HEAD}

    return unpack


def same(a: Stored, b: Stored, rows: int = 1024) -> bool:
    """Whether two tensors are equal, read some rows at a time."""
    if a.shape != b.shape:
        return False
    pieces = (slice(i, i + rows) for i in range(0, a.shape[0], rows))
    return all(np.array_equal(a.read(piece), b.read(piece)) for piece in pieces)


def blocks_of(model: Any, mlps: tuple[type, ...] = (Mlp,)) -> list[Any]:
    """The blocks of a model in turn, or none where it is not of parts that are known."""
    if type(model) is not LanguageModel or type(model.table) is not TokenTable:
        return []
    try:
        blocks: list[Any] = [layer.block for layer in layers_of(model.stack)]
    except ValueError:  # A stack within a stack.
        return []
    known = model.norm is not None and all(
        type(block) in (Block, SandwichBlock, DeepBlock)
        and type(block.attention) is Attention
        and type(block.mlp) in mlps
        for block in blocks
    )
    return blocks if known else []


def told(model: Any, blocks: Sequence[Any]) -> dict[str, Any]:
    """What a config says of sizes, and of what all families have."""
    attention: Attention = blocks[0].attention
    return {
        "vocab_size": model.table.vocab,
        "hidden_size": model.table.width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads or attention.num_heads,
        "head_dim": attention.head_dim,
        "hidden_act": name_of(blocks[0].mlp.activation),
        "rms_norm_eps": blocks[0].epsilon,
        "tie_word_embeddings": model.head is None,
    }


def told_rotary(model: Any, block: Any) -> dict[str, Any]:
    """What it says of the positions of a block that sees all, and of the length."""
    rotary = block.attention.scores.rotary
    if rotary is None:
        return {}
    return {"rope_parameters": told_of(rotary)} | told_length(model.length, rotary)


def told_windows(blocks: Iterable[Any]) -> dict[str, Any]:
    """What it says of windows, one layer after the other."""
    windows = [block.attention.scores.window for block in blocks]
    return {
        "sliding_window": next((w for w in windows if w is not None), None),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }


def entries(model: Any, mlp: Callable[..., list[Entry]] | None = None) -> list[Entry]:
    """The table of a model under Llama's names; `mlp` is that of another than `Mlp`."""
    found = [
        Entry("table/embedding", "model.embed_tokens.weight", "V D -> V D"),
        *parts.norm("norm", "model.norm", bias=False),
    ]
    if model.head is not None:
        found.append(Entry("head/kernel", HEAD, "V D -> D V"))
    for path, theirs, block, entry in places(model.stack, "model.layers"):
        attention: Attention = block.attention
        bias, out = attention.use_bias, attention.out_bias
        found += parts.attention(
            f"{path}/attention",
            f"{theirs}.self_attn",
            NAMES,
            attention.num_heads,
            kv_heads=attention.num_kv_heads,
            bias=bias,
            without=() if out is None or out == bias else ("out",),
            **entry,
        )
        if attention.qk_norm is not None:
            for name in ("query", "key"):
                tensor = f"{theirs}.self_attn.{name[0]}_norm"
                found += parts.norm(
                    f"{path}/attention/{name}_norm", tensor, bias=False, **entry
                )
        for ours, name in (SANDWICH if type(block) is SandwichBlock else PRE).items():
            found += parts.norm(f"{path}/{ours}", f"{theirs}.{name}", bias=False, **entry)
        if type(block.mlp) is not Mlp and mlp is not None:
            found += mlp(block.mlp, f"{path}/mlp", theirs, **entry)
            continue
        for name in ("gate", "up", "down"):
            ours, tensor = f"{path}/mlp/{name}", f"{theirs}.mlp.{name}_proj"
            found += parts.linear(ours, tensor, bias=block.mlp.use_bias, **entry)
    return found


def places(stack: nn.Module, theirs: str) -> Iterable[tuple[str, str, Any, dict[str, Any]]]:
    """Where layers lie: our path, their name, the block, and more of each `Entry`.

    Layers in one array are one place, whose name has `{}` for their number.
    """
    numbered = sorted(enumerate(layers_of(stack)), key=lambda pair: pair[1].path)
    for path, group in itertools.groupby(numbered, lambda pair: pair[1].path):
        numbers, layers = zip(*group, strict=True)
        if layers[0].row is None:
            yield path, f"{theirs}.{numbers[0]}", layers[0].block, {}
        else:
            yield path, f"{theirs}.{{}}", layers[0].block, {"layers": numbers}


def inputs(model: Any) -> list[jax.ShapeDtypeStruct]:
    """A text of one token."""
    return [jax.ShapeDtypeStruct((1, 1), jnp.int32)]
