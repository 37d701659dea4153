"""timm's plain vision transformers, by timm itself."""

import functools

from jaxformer.layers.pool import Average, First
from jaxformer.ops.activation import gelu, gelu_tanh
from tests.parity.case import Case, wrong
from tests.parity.dino import RegistersFirst, as_class

TINY = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 1.7,
    "patch_size": 4,
    "img_size": (8, 12),
}
# So small that epsilon counts.
SMALL = dict.fromkeys(("patch_embed", "pos_embed", "cls_token", "reg_token", "gamma"), 1e-2)


@functools.cache
def _library():
    """timm, which asks for torchvision at import and never uses it here."""
    import importlib.machinery
    import sys
    from unittest import mock

    import torch
    import transformers  # noqa: F401  It must see that there is no torchvision.

    parts = "datasets datasets.folder io models models.feature_extraction ops ops.misc "
    parts += "transforms transforms.functional utils"
    names = ["torchvision", *(f"torchvision.{part}" for part in parts.split())]
    fakes = {name: mock.MagicMock(__path__=[]) for name in names}
    for name, fake in fakes.items():
        fake.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules |= fakes
    try:
        import timm
    finally:
        for name in fakes:
            del sys.modules[name]

    class Module(torch.nn.Module):
        """A model of timm with the face of one of transformers."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            found = self.model.forward_features(images)
            return {"tokens": found, "logits": self.model.forward_head(found)}

        def save_pretrained(self, directory):
            timm.models.save_for_hf(self.model, str(directory), safe_serialization=True)

        @classmethod
        def from_pretrained(cls, directory, output_loading_info):
            del output_loading_info  # It is strict.
            return cls(timm.create_model(f"local-dir:{directory}", pretrained=True)), {}

    return timm, Module


def _original(architecture: str, **fields):
    timm, module = _library()
    return module(timm.create_model(architecture, **TINY | {"num_classes": 5} | fields))


def _images(draw, rows=8, columns=12):
    return {"images": draw.normal(size=(2, rows, columns, 3)).astype("float32")}


def _theirs(module, inputs):
    return module(inputs["images"].permute(0, 3, 1, 2))


def _ours(model, variables, inputs):
    images = inputs["images"]
    return {
        "tokens": model.apply(variables, images, method="encode"),
        "logits": model.apply(variables, images),
    }


CASES = (
    Case(
        "timm_token",  # Whose positions are of the class token and the register too.
        functools.partial(
            _original,
            "vit_small_patch16_224",
            reg_tokens=1,
            init_values=0.5,
            dynamic_img_size=True,
            qkv_bias=False,
        ),
        functools.partial(_images, rows=12, columns=20),
        _theirs,
        _ours,
        {
            "gelu by tanh": wrong("stack.block.mlp.activation", gelu_tanh),
            "epsilon": wrong("stack.block.epsilon", 1e-5),
            "last epsilon": wrong("norm.epsilon", 1e-5),
            "resize without antialias": wrong("embed.position.antialias", False),
            "bilinear resize": wrong("embed.position.method", "bilinear"),
            "mean of all tokens": wrong("pool", Average()),
            "register before the class token": as_class("embed", RegistersFirst),
        },
        SMALL,
    ),
    Case(
        "timm_average",
        functools.partial(
            _original, "vit_medium_patch16_reg4_gap_256", reg_tokens=2, class_token=True
        ),
        _images,
        _theirs,
        _ours,
        {
            "mean of registers too": wrong("pool", Average(1)),
            "class token": wrong("pool", First()),
            "norm's epsilon": wrong("neck.epsilon", 1e-5),
        },
        SMALL,
    ),
    Case(
        "timm_map",
        functools.partial(
            _original, "vit_large_patch16_siglip_512", reg_tokens=1, act_layer="gelu_tanh"
        ),
        _images,
        _theirs,
        _ours,
        {
            "exact gelu": wrong("stack.block.mlp.activation", gelu),
            "exact gelu in the pool": wrong("pool.pool.mlp.activation", gelu),
            "epsilon in the pool": wrong("pool.pool.epsilon", 1e-5),
            "register pooled too": wrong("pool.skip", 0),
        },
        {"attn_pool.proj": 1e-2},
    ),
    Case(
        "timm_clip",
        functools.partial(_original, "vit_base_patch32_clip_quickgelu_224"),
        _images,
        _theirs,
        _ours,
        {
            "exact gelu": wrong("stack.block.mlp.activation", gelu),
            "epsilon": wrong("stack.block.epsilon", 1e-6),
            "first epsilon": wrong("embed.norm.epsilon", 1e-6),
        },
        {**SMALL, "norm_pre": 1e-2, "attn.proj": 1e-2, "fc2": 1e-2},
    ),
    Case(
        "timm_dinov2",
        functools.partial(_original, "vit_giant_patch14_reg4_dinov2", mlp_ratio=3.5),
        _images,
        _theirs,
        _ours,
        {"gate by gelu": wrong("stack.block.mlp.activation", gelu)},
    ),
)
