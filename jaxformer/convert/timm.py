"""timm's plain vision transformers: a hub directory whose config names an `architecture`.

Where a patch does not divide the image, timm looks at no pixels of what is left at the
bottom and the right (384 pixels in patches of 14: 378); here those are for who calls to
cut away.
"""

from typing import Any

from jaxformer.convert import parts
from jaxformer.convert.config import number, pair
from jaxformer.convert.engine import Entry, Family
from jaxformer.convert.timm_names import DEFAULTS, KNOWN, arguments
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Mlp, Stack
from jaxformer.layers.embed import GridPosition, PatchEmbed
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.pool import AttentionPool, Average, First, Rest
from jaxformer.models.vit import Encoder
from jaxformer.ops.activation import gelu, gelu_tanh, quick_gelu, silu

ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu, "silu": silu}
# Arguments of a model that say how it is trained or sized, and not what it is.
_OTHER = {"num_classes", "in_chans", "img_size", "dynamic_img_size", "weight_init", "fix_init"}
_OTHER |= {f"{name}_rate" for name in ("drop", "pos_drop", "patch_drop", "proj_drop")}
_OTHER |= {"attn_drop_rate", "drop_path_rate"}
# The architecture that is written, by what arguments alone cannot say.
_BASES = {
    (1e-6, False): "vit_base_patch16_224",
    (1e-5, False): "vit_base_patch16_clip_224",
    (1e-6, True): "vit_giant_patch14_dinov2",
}


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the model, those that the config gives in the place of the name's."""
    name = config.get("architecture")
    known = arguments(name) if isinstance(name, str) else None
    if known is None:
        raise InputError(
            f"config.json: architecture {name!r} is not known; known are {', '.join(KNOWN)}"
        )
    given = config.get("model_args") or {}
    theirs = DEFAULTS.keys() - {"epsilon", "gated"}
    args = known | {k: v for k, v in given.items() if k in theirs}
    more = sorted(k for k in given.keys() - theirs - _OTHER if given[k])
    if more:
        raise InputError(f"config.json: model_args has {', '.join(more)}; not known here")
    if args["act_layer"] not in ACTIVATIONS:
        raise InputError(
            f"config.json: act_layer={args['act_layer']!r} is not known; known are "
            f"{', '.join(ACTIVATIONS)}"
        )
    return args


def _size(config: dict[str, Any]) -> tuple[tuple[int, int], int]:
    """Rows and columns of pixels, and channels."""
    given, trained = config.get("model_args") or {}, config.get("pretrained_cfg") or config
    channels, *size = trained.get("input_size") or (3, 224, 224)
    if not trained.get("fixed_input_size", True):
        size = [224, 224]
    size = given.get("img_size") or size
    channels = number({"in_chans": given.get("in_chans") or channels}, "in_chans", 3)
    return pair({"img_size": size}, "img_size", 224), channels


def _model(config: dict[str, Any], names: set[str], dtype: Any) -> Encoder:
    args, (size, channels) = _arguments(config), _size(config)
    D, N = number(args, "embed_dim", 768), number(args, "num_heads", 12)
    patch, epsilon = number(args, "patch_size", 16), args["epsilon"]
    if D % N:
        raise InputError(f"config.json: num_heads={N} must divide embed_dim={D}")
    if min(size) < patch:
        raise InputError(
            f"config.json: patch_size={patch} must be no more than img_size={size}"
        )
    registers, prefix = int(args["reg_tokens"] or 0), int(bool(args["class_token"]))
    hidden = int(D * number(args, "mlp_ratio", 4.0))
    activation, gated = ACTIVATIONS[args["act_layer"]], args["gated"]

    def mlp(gated: bool = gated) -> Mlp:
        return Mlp(hidden // (2 if gated else 1), activation, gated, True, dtype=dtype)

    def attention(bias: bool) -> Attention:
        return Attention(N, D // N, use_bias=bias, out_bias=True, dtype=dtype)

    skip = 0 if args["pool_include_prefix"] else prefix + registers
    kind = args["global_pool"]
    if kind == "token" and prefix:
        pool = First()
    elif kind == "avg":
        pool = Average(skip)
    elif kind == "map":
        pool = AttentionPool(attention(True), mlp(False), epsilon)
        pool = Rest(pool, skip) if skip else pool
    else:
        raise InputError(
            f"config.json: global_pool={kind!r} must be 'token' (with class_token), 'avg' or "
            "'map'"
        )
    after = kind == "avg" if args["fc_norm"] is None else bool(args["fc_norm"])
    block = Block(
        attention(bool(args["qkv_bias"])),
        mlp(),
        epsilon=epsilon,
        layer_scale=args["init_values"] or None,
    )
    normed = bool(args["final_norm"])
    return Encoder(
        PatchEmbed(
            patch,
            D,
            GridPosition(
                D,
                (size[0] // patch, size[1] // patch),
                0 if args["no_embed_class"] else prefix + registers,
                antialias=True,
            ),
            prefix=prefix,
            registers=registers,
            use_bias=not args["pre_norm"],
            norm=LayerNorm(epsilon) if args["pre_norm"] else None,
            channels=channels,
            dtype=dtype,
        ),
        Stack(block, number(args, "depth", 12)),
        LayerNorm(epsilon) if normed and not after else None,
        pool,
        LayerNorm(epsilon) if normed and after else None,
        _classes(config) if "head.weight" in names else 0,
        dtype=dtype,
    )


def _classes(config: dict[str, Any]) -> int:
    given, trained = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    found = given.get("num_classes", config.get("num_classes", trained.get("num_classes")))
    return number({"num_classes": found}, "num_classes", 1000)


def _config(model: Any) -> dict[str, Any] | None:
    if not parts.is_plain(model) or not isinstance(model.embed.position, GridPosition):
        return None
    embed, stack, block = model.embed, model.stack, model.stack.block
    pool = model.pool.pool if isinstance(model.pool, Rest) else model.pool
    mlp, position, tokens = block.mlp, embed.position, embed.prefix + embed.registers
    kind = {First: "token", Average: "avg", AttentionPool: "map"}.get(type(pool))
    name = next((n for n, f in ACTIVATIONS.items() if f is mlp.activation), None)
    base = _BASES.get((block.epsilon, mlp.gated))
    if position.shape is None or None in (kind, name, base):
        return None
    skip = getattr(model.pool, "skip", 0)
    size = [n * embed.patch for n in position.shape]
    hidden, channels = mlp.width * (2 if mlp.gated else 1), embed.channels or 3
    ratio = hidden / embed.width
    args = {
        "img_size": size,
        "dynamic_img_size": True,  # As ours, which resizes its positions.
        "patch_size": embed.patch,
        "in_chans": channels,
        "embed_dim": embed.width,
        "depth": stack.depth,
        "num_heads": block.attention.num_heads,
        "mlp_ratio": ratio if int(embed.width * ratio) == hidden else ratio * (1 + 1e-9),
        "qkv_bias": block.attention.use_bias,
        "init_values": block.layer_scale,
        "class_token": bool(embed.prefix),
        "no_embed_class": not position.prefix and tokens > 0,
        "reg_tokens": embed.registers,
        "pre_norm": embed.norm is not None,
        "final_norm": model.norm is not None or model.neck is not None,
        "fc_norm": model.neck is not None,
        "global_pool": kind,
        "pool_include_prefix": kind != "token" and skip < tokens,
        "act_layer": name,
    }
    return {
        "architecture": base,
        "num_classes": model.num_classes,
        "num_features": embed.width,
        "global_pool": kind,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [channels, *size],
            "fixed_input_size": False,
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _entries(model: Any) -> list[Entry]:
    embed, block, path = model.embed, model.stack.block, "stack/block"
    bias, heads = block.attention.use_bias, block.attention.num_heads
    found = [
        Entry("embed/position/embedding", "pos_embed", "() T D -> T D"),
        *parts.patches("embed/patch", "patch_embed.proj", embed.patch, embed.use_bias),
        *parts.fused_attention(
            f"{path}/attention",
            "blocks.{}.attn.qkv",
            "blocks.{}.attn.proj",
            heads,
            without=() if bias else ("query", "key", "value"),
        ),
        *parts.norm(f"{path}/attention_norm", "blocks.{}.norm1"),
        *parts.norm(f"{path}/mlp_norm", "blocks.{}.norm2"),
        *parts.linear(f"{path}/mlp/down", "blocks.{}.mlp.fc2"),
    ]
    widen = ("gate", "up") if block.mlp.gated else ("up",)
    for i, name in enumerate(widen):
        part = (i, len(widen))
        found += parts.linear(f"{path}/mlp/{name}", "blocks.{}.mlp.fc1", part=part)
    if block.layer_scale is not None:
        found += parts.layer_scale(f"{path}/attention_scale", "blocks.{}.ls1.gamma")
        found += parts.layer_scale(f"{path}/mlp_scale", "blocks.{}.ls2.gamma")
    if embed.prefix:
        found.append(Entry("embed/cls/embedding", "cls_token", "() T D -> T D"))
    if embed.registers:
        found.append(Entry("embed/registers/embedding", "reg_token", "() T D -> T D"))
    for ours, theirs, norm in (
        ("embed/norm", "norm_pre", embed.norm),
        ("norm", "norm", model.norm),
        ("neck", "fc_norm", model.neck),
    ):
        found += [] if norm is None else parts.norm(ours, theirs)
    if isinstance(model.pool, AttentionPool | Rest):
        found += _pool("pool/pool" if isinstance(model.pool, Rest) else "pool", heads)
    if model.num_classes:
        found += parts.linear("head", "head")
    return found


def _pool(path: str, heads: int) -> list[Entry]:
    sizes, theirs = {"N": heads}, "attn_pool"
    found = [
        Entry(f"{path}/probe/embedding", f"{theirs}.latent", "() T D -> T D"),
        *parts.norm(f"{path}/norm", f"{theirs}.norm"),
        *parts.linear(f"{path}/mlp/up", f"{theirs}.mlp.fc1"),
        *parts.linear(f"{path}/mlp/down", f"{theirs}.mlp.fc2"),
        Entry(
            f"{path}/attention/out/kernel", f"{theirs}.proj.weight", "D (N H) -> N H D", sizes
        ),
        Entry(f"{path}/attention/out/bias", f"{theirs}.proj.bias", "D -> D"),
    ]
    for name, tensor, part in (
        ("query", "q", None),
        ("key", "kv", (0, 2)),
        ("value", "kv", (1, 2)),
    ):
        ours, name = f"{path}/attention/{name}", f"{theirs}.{tensor}"
        layout = "(N H) D -> D N H"
        found.append(Entry(f"{ours}/kernel", f"{name}.weight", layout, sizes, part))
        found.append(Entry(f"{ours}/bias", f"{name}.bias", "(N H) -> N H", sizes, part))
    return found


TIMM = Family(
    name="timm",
    model=_model,
    config=_config,
    entries=_entries,
    inputs=lambda model: [parts.image(model.embed)],
)
