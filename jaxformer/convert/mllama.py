"""Llama 3.2 Vision of transformers: `MllamaForConditionalGeneration`.

A tower of tiles in two encoders, a linear layer, and a Llama some of whose layers look at
the images in the place of the text. Files as transformers 5 holds them are read too; those
that are written have the hub's names.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.convert import language, parts, rotary
from jaxformer.convert.config import activation_of, name_of, number, part
from jaxformer.convert.engine import Entry, Family
from jaxformer.convert.stacks import layers_of
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention, Scores
from jaxformer.layers.block import Block, Mlp, Stack
from jaxformer.layers.connect import Project
from jaxformer.layers.gated import HalfOpenBlock, ServedBlock
from jaxformer.layers.norm import LayerNorm, RMSNorm
from jaxformer.layers.text import TokenTable
from jaxformer.layers.tiles import RATIOS, TileEmbed, TileVectors
from jaxformer.models.decoder import LanguageModel
from jaxformer.models.mllama import Mllama, TiledEncoder, sighted

_TEXT, _VISION, _EPSILON = "language_model.model", "vision_model", 1e-5
_MORE = 8  # rows of the table beyond the words that logits are of: that of images is one.
_TAPS, _CROSS = [3, 7, 15, 23, 30], [3, 8, 13, 18, 23, 28, 33, 38]
_THETA = 5e5
# What the config of the text leaves out.
_LLAMA = {"rms_norm_eps": _EPSILON, "num_key_value_heads": 8, "num_hidden_layers": 40}


def _part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in part(config, name).items() if value is not None}


def _numbers(config: Mapping[str, Any], name: str, default: list[int]) -> list[int]:
    found = config.get(name, default)
    if not isinstance(found, list) or not all(type(n) is int and n >= 0 for n in found):
        raise InputError(f"config.json: {name}={found!r} must be a list of layers' numbers")
    return found


def _model(config: dict[str, Any], names: set[str], dtype: Any) -> Mllama:
    text = _text(_part(config, "text_config"), names, dtype)
    vision = _vision(_part(config, "vision_config"), dtype)
    image = config.get("image_token_index", config.get("image_token_id", 128256))
    if isinstance(image, bool) or not isinstance(image, int) or image < 0:
        raise InputError(f"config.json: image_token_index={image!r} must be a token's id")
    return Mllama(vision, Project(text.table.width, dtype=dtype), text, image)


def _vision(config: dict[str, Any], dtype: Any) -> TiledEncoder:
    D, N = number(config, "hidden_size", 1280), number(config, "attention_heads", 16)
    depth = number(config, "num_hidden_layers", 32)
    taps = _numbers(config, "intermediate_layers_indices", _TAPS)
    size, patch = number(config, "image_size", 448), number(config, "patch_size", 14)
    ratios = tuple(map(tuple, config.get("supported_aspect_ratios", RATIOS)))
    tiles = number(config, "max_num_tiles", 4)
    if D % N or size % patch:
        raise InputError(
            f"config.json: attention_heads={N} must divide hidden_size={D}, and "
            f"patch_size={patch} image_size={size}"
        )
    if sorted({*taps}) != taps or (taps and taps[-1] >= depth - 1):
        raise InputError(
            f"config.json: intermediate_layers_indices={taps} must grow, and be below "
            f"{depth - 1}, the last layer"
        )
    if any(len(r) != 2 or not 1 <= r[0] * r[1] <= tiles for r in ratios):
        raise InputError(
            f"config.json: supported_aspect_ratios={ratios} must be pairs of rows and columns "
            f"of up to max_num_tiles={tiles} tiles"
        )
    wide = D * (1 + len(taps))
    if number(config, "vision_output_dim", wide) != wide:
        raise InputError(
            f"config.json: vision_output_dim={config['vision_output_dim']} must be {wide}: "
            f"hidden_size={D} from the end and from each of {taps}"
        )
    epsilon, F = number(config, "norm_eps", _EPSILON), number(config, "intermediate_size", 5120)
    activation = activation_of(config, "hidden_act", "gelu")

    def stack(kind: type[Block], depth: int) -> Stack:
        mlp = Mlp(F, activation, use_bias=True, dtype=dtype)
        return Stack(kind(Attention(N, D // N, dtype=dtype), mlp, epsilon=epsilon), depth)

    ends = [*(tap + 1 for tap in taps), depth]
    channels = number(config, "num_channels", 3)
    return TiledEncoder(
        TileEmbed(patch, D, size, tiles, ratios, channels, dtype),
        tuple(stack(Block, b - a) for a, b in zip([0, *ends], ends, strict=False)),
        LayerNorm(_EPSILON),
        TileVectors(len(ratios), tiles, D),
        stack(HalfOpenBlock, number(config, "num_global_layers", 8)),
    )


def _text(config: dict[str, Any], names: set[str], dtype: Any) -> LanguageModel:
    told = _LLAMA | config
    language.refuse(told, tie_word_embeddings=False)
    depth, cross = language.depth_of(told), _numbers(told, "cross_attention_layers", _CROSS)
    if any(layer >= depth for layer in cross):
        raise InputError(
            f"config.json: cross_attention_layers={cross} must be below "
            f"num_hidden_layers={depth}"
        )
    turns, epsilon = rotary.rotary_of(told, _THETA), language.epsilon_of(told)

    def layer(i: int) -> Block:
        mlp = language.mlp_of(told, 14336, dtype)
        if i not in cross:
            own = language.attention_of(told, Scores(turns), dtype)
            return Block(own, mlp, RMSNorm, epsilon)
        look = language.attention_of(told, Scores(), dtype, qk_norm=RMSNorm)
        return ServedBlock(look, mlp, RMSNorm, epsilon)

    blocks = [layer(i) for i in range(depth)]
    made = language.assemble(told, names, blocks, turns, dtype, vocab=128256)
    table = TokenTable(made.table.vocab + _MORE, made.table.width, dtype=dtype)
    return made.clone(table=table, stack=sighted(made.stack))


def _config(model: Any) -> dict[str, Any] | None:
    if type(model) is not Mllama or type(model.connector) is not Project or model.skip:
        return None
    vision, text = _told_vision(model.vision), _told_text(model.language)
    if vision is None or text is None:
        return None
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": model.image,
        "vision_config": {"model_type": "mllama_vision_model", **vision},
        # Whose padding is the tokenizer's; the default is beyond a small vocabulary.
        "text_config": {"model_type": "mllama_text_model", "pad_token_id": None, **text},
    }


def _told_vision(tower: Any) -> dict[str, Any] | None:
    if type(tower) is not TiledEncoder or tower.multiple != 8:
        return None
    embed, stacks = tower.embed, [*tower.local, tower.whole]
    if not all(type(stack) is Stack for stack in stacks):
        return None
    block: Any = stacks[0].block
    ends = [sum(s.depth for s in stacks[:i]) for i in range(1, len(stacks))]
    return {
        "hidden_size": embed.width,
        "hidden_act": name_of(block.mlp.activation),
        "num_hidden_layers": ends[-1],
        "num_global_layers": tower.whole.depth,  # pyright: ignore[reportAttributeAccessIssue]
        "attention_heads": block.attention.num_heads,
        "num_channels": embed.channels,
        "intermediate_size": block.mlp.width,
        "vision_output_dim": embed.width * len(tower.local),
        "image_size": embed.size,
        "patch_size": embed.patch,
        "norm_eps": block.epsilon,
        "max_num_tiles": embed.tiles,
        "intermediate_layers_indices": [end - 1 for end in ends[:-1]],
        "supported_aspect_ratios": [list(ratio) for ratio in embed.ratios],
    }


def _told_text(model: Any) -> dict[str, Any] | None:
    if type(model) is not LanguageModel or model.head is None:
        return None
    blocks: list[Any] = [layer.block for layer in layers_of(model.stack)]
    own = next((block for block in blocks if type(block) is Block), None)
    if own is None or not all(type(block) in (Block, ServedBlock) for block in blocks):
        return None
    told = language.told(model, [own]) | language.told_rotary(model, own)
    del told["head_dim"]
    cross = [i for i, block in enumerate(blocks) if type(block) is ServedBlock]
    return told | {
        "vocab_size": model.table.vocab - _MORE,
        "num_hidden_layers": len(blocks),
        "intermediate_size": own.mlp.width,
        "cross_attention_layers": cross,
    }


def _entries(model: Any) -> list[Entry]:
    return [
        *_tiles(model.vision),
        *parts.linear("connector/out", "multi_modal_projector"),
        *_words(model.language),
    ]


def _tiles(tower: TiledEncoder) -> list[Entry]:
    ours, position = "vision/embed", f"{_VISION}.gated_positional_embedding"
    # Rows of a table hold what belongs to a ratio, tile by tile.
    found = [
        *parts.patches(f"{ours}/patch", f"{_VISION}.patch_embedding", tower.embed.patch, False),
        Entry(f"{ours}/cls/embedding", f"{_VISION}.class_embedding", "D -> D", at=0),
        Entry(f"{ours}/position/tile/embedding", f"{position}.embedding", "T D -> T D"),
        Entry(
            f"{ours}/position/embedding",
            f"{position}.tile_embedding.weight",
            "R (N T D) -> R N T D",
        ),
        Entry(f"{ours}/position/scale", f"{position}.gate", "() ->"),
        *parts.norm(f"{ours}/norm", f"{_VISION}.layernorm_pre"),
        *parts.norm("vision/norm", f"{_VISION}.layernorm_post"),
    ]
    for path, when in ((f"{ours}/tile", "pre"), ("vision/after", "post")):
        theirs = f"{_VISION}.{when}_tile_positional_embedding"
        table = Entry(f"{path}/embedding", f"{theirs}.embedding.weight", "R (N D) -> R N D")
        found += [table, Entry(f"{path}/scale", f"{theirs}.gate", "() ->")]
    first = 0
    for i, stack in enumerate(tower.local):
        depth = stack.depth  # pyright: ignore[reportAttributeAccessIssue]
        numbers = range(first, first + depth)
        found += _layers(f"vision/local_{i}", "transformer", stack, layers=numbers)
        first += depth
    return [*found, *_layers("vision/whole", "global_transformer", tower.whole)]


def _layers(ours: str, theirs: str, stack: Any, **entry: Any) -> list[Entry]:
    block, layer = stack.block, f"{_VISION}.{theirs}.layers.{{}}"
    attention, path = f"{layer}.self_attn", f"{ours}/block"
    heads, plain = block.attention.num_heads, {"bias": False, **entry}
    found = [
        *parts.attention(f"{path}/attention", attention, language.NAMES, heads, **plain),
        *parts.linear(f"{path}/mlp/up", f"{layer}.mlp.fc1", **entry),
        *parts.linear(f"{path}/mlp/down", f"{layer}.mlp.fc2", **entry),
    ]
    for name, norm in language.PRE.items():
        found += parts.norm(f"{path}/{name}", f"{layer}.{norm}", **entry)
    if type(block) is HalfOpenBlock:
        for name, gate in (("attention", "attn"), ("mlp", "ffn")):
            where = f"{path}/{name}_gate/scale"
            found.append(Entry(where, f"{layer}.gate_{gate}", "() ->", **entry))
    return found


def _words(model: Any) -> list[Entry]:
    head = f"language_model.{language.HEAD}"
    found = [
        Entry("language/table/embedding", f"{_TEXT}.embed_tokens.weight", "V D -> V D"),
        Entry("language/head/kernel", head, "V D -> D V"),
        *parts.norm("language/norm", f"{_TEXT}.norm", bias=False),
    ]
    for where, layer, block, entry in language.places(model.stack, f"{_TEXT}.layers"):
        path, attention = f"language/{where}", block.attention
        sees = type(block) is ServedBlock
        theirs = f"{layer}.cross_attn" if sees else f"{layer}.self_attn"
        found += parts.attention(
            f"{path}/attention",
            theirs,
            language.NAMES,
            attention.num_heads,
            kv_heads=attention.num_kv_heads,
            bias=False,
            **entry,
        )
        for ours, name in language.PRE.items():
            found += parts.norm(f"{path}/{ours}", f"{layer}.{name}", bias=False, **entry)
        for name in ("gate", "up", "down"):
            ours, tensor = f"{path}/mlp/{name}", f"{layer}.mlp.{name}_proj"
            found += parts.linear(ours, tensor, bias=False, **entry)
        if not sees:
            continue
        for name in ("query", "key"):
            ours = f"{path}/attention/{name}_norm"
            found += parts.norm(ours, f"{theirs}.{name[0]}_norm", bias=False, **entry)
        for name, gate in (("attention", "attn"), ("mlp", "mlp")):
            tensor = f"{layer}.cross_attn_{gate}_gate"
            found.append(Entry(f"{path}/{name}_gate/scale", tensor, "() ->", **entry))
    return found


def _inputs(model: Any) -> list[jax.ShapeDtypeStruct]:
    embed = model.vision.embed
    tile = (embed.size, embed.size, embed.channels)
    return [
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
        jax.ShapeDtypeStruct((1, 1, embed.tiles, *tile), jnp.float32),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
    ]


MLLAMA = Family(
    name="mllama",
    model=_model,
    config=_config,
    entries=_entries,
    inputs=_inputs,
    rename=(
        (r"^model\.(vision_model|multi_modal_projector)\.", r"\1."),
        (r"^model\.language_model\.", f"{_TEXT}."),
        (r"^lm_head\.", "language_model.lm_head."),
    ),
    ignore=language.IGNORE,
)
