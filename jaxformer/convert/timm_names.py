"""What timm's names of plain vision transformers stand for, in timm's own words.

Read from timm 1.0's `vision_transformer.py` and `deit.py`, and tested against the numbers
of parameters that timm counts.
"""

import re
from typing import Any

# What an architecture has where nothing is said. `epsilon` and `gated` are ours: timm
# passes a class there.
DEFAULTS: dict[str, Any] = {
    "patch_size": 16,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "init_values": None,
    "class_token": True,
    "no_embed_class": False,
    "reg_tokens": 0,
    "pre_norm": False,
    "final_norm": True,
    "fc_norm": None,
    "global_pool": "token",
    "pool_include_prefix": False,
    "act_layer": "gelu",
    "epsilon": 1e-6,
    "gated": False,
}

# Width, depth, heads, and the MLP's width as a multiple.
_SIZES = {
    "tiny": (192, 12, 3, 4.0),
    "xsmall": (256, 10, 4, 4.0),
    "wee": (256, 14, 4, 5.0),
    "little": (320, 14, 5, 5.6),
    "small": (384, 12, 6, 4.0),
    "medium": (512, 12, 8, 4.0),
    "mediumd": (512, 20, 8, 4.0),
    "betwixt": (640, 12, 10, 4.0),
    "base": (768, 12, 12, 4.0),
    "so150m": (896, 18, 14, 2.572),
    "so150m2": (832, 21, 13, 34 / 13),
    "large": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 3.7362),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
    "giantopt": (1536, 40, 16, 4.0),
    "gigantic": (1664, 48, 16, 64 / 13),
}
_BARE = {"class_token": False, "global_pool": "avg"}
_GAP = {**_BARE, "fc_norm": False}
_REGISTERS = {**_BARE, "no_embed_class": True, "init_values": 1e-5}
_MAP = {"class_token": False, "global_pool": "map"}
_CLIP = {"pre_norm": True, "epsilon": 1e-5}
_DINO = {"init_values": 1e-5}
_DINO_REGISTERS = {**_DINO, "reg_tokens": 4, "no_embed_class": True}
_PLAIN_SIZES = "tiny small base large huge giant gigantic"
_CLIP_SIZES = "xsmall medium betwixt base large huge giant gigantic"
_SIGLIP_SIZES = "base large so400m giantopt"
_DINO_SIZES = "small base large giant"
# What stands before the size and after the patch; the sizes; what they have.
_KINDS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("vit", "", _PLAIN_SIZES, {}),
    ("deit", "", "tiny small base", {}),
    (
        "deit3",
        "",
        "small medium base large huge",
        {"no_embed_class": True, "init_values": 1e-6},
    ),
    ("vit", "gap", "medium betwixt base huge giant", _GAP),
    ("vit", "reg1_gap", "wee medium betwixt little so150m2", _REGISTERS | {"reg_tokens": 1}),
    ("vit", "reg4_gap", "little medium mediumd betwixt", _REGISTERS | {"reg_tokens": 4}),
    ("vit", "clip", _CLIP_SIZES, _CLIP),
    (
        "vit",
        "clip_quickgelu",
        "base large huge gigantic",
        _CLIP | {"act_layer": "quick_gelu"},
    ),
    ("vit", "siglip", _SIGLIP_SIZES, _MAP),
    ("vit", "siglip_gap", _SIGLIP_SIZES, _GAP),
    ("vit", "dinov2", _DINO_SIZES, _DINO),
    ("vit", "reg4_dinov2", _DINO_SIZES, _DINO_REGISTERS),
]
# And those that have something of their own.
_SMALL_GAP = {"qkv_bias": False, "init_values": 1e-6}
_SWIGLU = {
    "embed_dim": 1536,
    "num_heads": 24,
    "mlp_ratio": 2.66667 * 2,
    "gated": True,
    "act_layer": "silu",
}
_OWN: dict[tuple[str, str], dict[str, Any]] = {
    ("vit_medium", "gap"): _GAP | _SMALL_GAP,
    ("vit_betwixt", "gap"): _GAP | _SMALL_GAP,
    ("vit_base", "gap"): _GAP | {"num_heads": 16},
    ("vit_so150m2", "reg1_gap"): _BARE
    | {"reg_tokens": 1, "init_values": 1e-5, "qkv_bias": False},
    ("vit_base", "reg4_gap"): _BARE | {"reg_tokens": 4, "no_embed_class": True},
    ("vit_so150m", "reg4_gap"): _GAP | {"reg_tokens": 4},
    ("vit_so150m", "reg4_map"): _MAP | {"reg_tokens": 4},
    ("vit_giant", "dinov2"): _DINO | _SWIGLU,
    ("vit_giant", "reg4_dinov2"): _DINO_REGISTERS | _SWIGLU,
}
# SigLIP has GELU by tanh, but timm took the exact one for all but these.
_TANH = r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip.*|vit_large_.*_siglip.*_512"


def _table() -> dict[tuple[str, str], dict[str, Any]]:
    names = {
        (f"{family}_{size}", kind): (size, has)
        for family, kind, sizes, has in _KINDS
        for size in sizes.split()
    }
    names |= {name: (name[0].split("_")[1], has) for name, has in _OWN.items()}
    fields = ("embed_dim", "depth", "num_heads", "mlp_ratio")
    return {
        name: DEFAULTS | dict(zip(fields, _SIZES[size], strict=True)) | has
        for name, (size, has) in names.items()
    }


ARCHITECTURES = _table()
KNOWN = sorted(f"{size}_patch*{'_' if kind else ''}{kind}[_*]" for size, kind in ARCHITECTURES)


def arguments(architecture: str) -> dict[str, Any] | None:
    """The arguments that a name stands for, all of `DEFAULTS`; None where it is not known.

    A name is a size, `_patch` and its pixels, what kind it is, and the pixels of an image,
    of which nothing is read here: `vit_base_patch16_siglip_224`.
    """
    found = re.fullmatch(r"(\w+?)_patch(\d+)(?:_([a-z]\w*?))?(?:_\d+)?", architecture)
    if found is None:
        return None
    size, patch, kind = found.groups()
    known = ARCHITECTURES.get((size, kind or ""))
    if known is None:
        return None
    tanh = {"act_layer": "gelu_tanh"} if re.fullmatch(_TANH, architecture) else {}
    return {**known, "patch_size": int(patch), **tanh}
