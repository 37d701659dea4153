"""ViT and DeiT of transformers."""

import functools

import jax.numpy as jnp

from jaxformer.layers.pool import Average, TanhLayer
from jaxformer.ops.activation import gelu_tanh
from tests.parity.case import Case, wrong

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": [8, 12],
    "patch_size": 4,
    "num_labels": 5,
}


def _original(kind: str, task: str, **fields):
    import importlib

    library = importlib.import_module(f"transformers.models.{kind.lower()}")
    config = getattr(library, f"{kind}Config")(**TINY | fields)
    return getattr(library, f"{kind}{task}")(config)


def _images(draw, rows=8, columns=12):
    return {"images": draw.normal(size=(2, rows, columns, 3)).astype("float32")}


def _logits(module, inputs, **options):
    images = inputs["images"].permute(0, 3, 1, 2)
    found = module(images, output_hidden_states=False, **options)
    return {"logits": found.logits}


def _features(module, inputs):
    found = module(inputs["images"].permute(0, 3, 1, 2))
    return {"pooled": found.pooler_output, "tokens": found.last_hidden_state}


def _our_logits(model, variables, inputs):
    return {"logits": model.apply(variables, inputs["images"])}


def _our_features(model, variables, inputs):
    return {
        "pooled": model.apply(variables, inputs["images"]),
        "tokens": model.apply(variables, inputs["images"], method="encode"),
    }


class NoTanh(TanhLayer):
    """The pooled vector before its tanh, which is wrong."""

    def __call__(self, x):
        return jnp.arctanh(super().__call__(x))


FACTS = {
    "gelu by tanh": wrong("stack.block.mlp.activation", gelu_tanh),
    "mean of all tokens": wrong("pool", Average()),
    "antialiased resize": wrong("embed.position.antialias", True),
    "bilinear resize": wrong("embed.position.method", "bilinear"),
}
_LARGER = functools.partial(_images, rows=16, columns=20)

CASES = (
    Case(
        "vit_classify",
        functools.partial(_original, "ViT", "ForImageClassification"),
        _images,
        _logits,
        _our_logits,
        {k: FACTS[k] for k in ("gelu by tanh", "mean of all tokens")},
    ),
    Case(
        "vit_resized",
        functools.partial(_original, "ViT", "ForImageClassification", image_size=12),
        _LARGER,
        functools.partial(_logits, interpolate_pos_encoding=True),
        _our_logits,
        {k: FACTS[k] for k in ("antialiased resize", "bilinear resize")},
    ),
    Case(
        "vit_small",  # Activations so small that epsilon counts.
        functools.partial(_original, "ViT", "ForImageClassification", layer_norm_eps=1e-6),
        _images,
        _logits,
        _our_logits,
        {"epsilon": wrong("stack.block.epsilon", 1e-5), "last": wrong("norm.epsilon", 1e-5)},
        {"embeddings": 1e-2, "o_proj": 1e-2, "fc2": 1e-2},
    ),
    Case(
        "vit_model",
        functools.partial(_original, "ViT", "Model"),
        _images,
        _features,
        _our_features,
        {"no tanh": wrong("neck", NoTanh(24))},
    ),
    Case(
        "vit_no_qkv_bias",
        functools.partial(_original, "ViT", "ForImageClassification", qkv_bias=False),
        _images,
        _logits,
        _our_logits,
    ),
    Case(
        "deit_classify",
        functools.partial(_original, "DeiT", "ForImageClassification"),
        _images,
        _logits,
        _our_logits,
    ),
    Case(
        "deit_teacher",
        functools.partial(_original, "DeiT", "ForImageClassificationWithTeacher"),
        _images,
        _logits,
        _our_logits,
    ),
)
