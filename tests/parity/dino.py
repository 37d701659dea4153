"""DINOv2, with and without registers, and DINOv3 of transformers."""

import dataclasses
import functools

import jax.numpy as jnp

from jaxformer.layers.embed import CenteredAngles, GridAngles, PatchEmbed
from jaxformer.layers.pool import Average, FirstAndAverage
from jaxformer.ops.activation import gelu, gelu_tanh
from tests.parity.case import Case, wrong

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "patch_size": 4,
    "image_size": 12,
}
# Two heads of 10, and SwiGLU of 53 up to a multiple of 8.
GATED = {"hidden_size": 20, "num_attention_heads": 2, "use_swiglu_ffn": True}
# So small that epsilon counts.
SMALL = {"embeddings": 1e-2, "lambda1": 1e-2}


def _original(family: str, name: str, task: str, **fields):
    import importlib

    library = importlib.import_module(f"transformers.models.{family}")
    config = getattr(library, f"{name}Config")(**TINY | fields)
    return getattr(library, f"{name}{task}")(config)


_dinov2 = functools.partial(_original, "dinov2", "Dinov2")
_registers = functools.partial(_original, "dinov2_with_registers", "Dinov2WithRegisters")
_dinov3 = functools.partial(_original, "dinov3_vit", "DINOv3ViT", "Model")


def _images(draw, rows=16, columns=20):
    return {"images": draw.normal(size=(2, rows, columns, 3)).astype("float32")}


def _masked_images(draw, rows=16, columns=20):
    masked = draw.random((2, rows * columns // 16)) < 0.4
    return {**_images(draw, rows, columns), "masked": masked}


def _features(module, inputs):
    images = inputs["images"].permute(0, 3, 1, 2)
    found = module(images, bool_masked_pos=inputs.get("masked"))
    return {"pooled": found.pooler_output, "tokens": found.last_hidden_state}


def _logits(module, inputs):
    images = inputs["images"].permute(0, 3, 1, 2)
    return {
        "logits": module(images).logits,
        "tokens": module.base_model(images).last_hidden_state,
    }


def _our_features(model, variables, inputs):
    found = inputs["images"], inputs.get("masked")
    return {
        "pooled": model.apply(variables, *found),
        "tokens": model.apply(variables, *found, method="encode"),
    }


def _our_logits(model, variables, inputs):
    images = inputs["images"]
    return {
        "logits": model.apply(variables, images),
        "tokens": model.apply(variables, images, method="encode"),
    }


class RegistersFirst(PatchEmbed):
    """Registers before the class token, which is wrong."""

    def __call__(self, *inputs, train=False):
        found = super().__call__(*inputs, train=train)
        x, n = found.x, 1 + self.registers
        return found._replace(x=jnp.concatenate([x[:, 1:n], x[:, :1], x[:, n:]], 1))


class TurnedPrefix(PatchEmbed):
    """Tokens before the patches are rotated too, which is wrong."""

    def __call__(self, *inputs, train=False):
        found = super().__call__(*inputs, train=train)
        n = 1 + self.registers
        return found._replace(block={"angles": found.block["angles"].at[:, 1:n].add(0.5)})


class ColumnsFirst(CenteredAngles):
    """Angles of the column before those of the row, which is wrong."""

    def __call__(self, y, x, *, train=False):
        rows, columns = jnp.split(super().__call__(y, x, train=train), 2, -1)
        return jnp.concatenate([columns, rows], -1)


def as_class(path: str, kind: type):
    """A mutation: the part at `path` is of another class, with the same fields."""

    def mutate(model, inputs):
        part = model
        for name in path.split("."):
            part = getattr(part, name)
        fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        return wrong(path, kind(**fields))(model, inputs)

    return mutate


def _nothing_masked(model, inputs):
    return model, {k: v for k, v in inputs.items() if k != "masked"}


CASES = (
    Case(
        "dinov2_model",
        functools.partial(_dinov2, "Model", mlp_ratio=2),
        _masked_images,
        _features,
        _our_features,
        {
            "gelu by tanh": wrong("stack.block.mlp.activation", gelu_tanh),
            "mean of all tokens": wrong("pool", Average()),
            "antialiased resize": wrong("embed.position.antialias", True),
            "bilinear resize": wrong("embed.position.method", "bilinear"),
            "nothing masked": _nothing_masked,
            "no layer scale": wrong("stack.block.layer_scale", None),
        },
    ),
    Case(
        "dinov2_classify",
        functools.partial(_dinov2, "ForImageClassification", num_labels=5, **GATED),
        functools.partial(_images, rows=12, columns=12),
        _logits,
        _our_logits,
        {
            "mean of all tokens": wrong("pool", FirstAndAverage(0)),
            "gate by gelu": wrong("stack.block.mlp.activation", gelu),
            "epsilon": wrong("stack.block.epsilon", 1e-5),
            "last epsilon": wrong("norm.epsilon", 1e-5),
        },
        SMALL,
    ),
    Case(
        "dinov2_registers",
        functools.partial(
            _registers,
            "ForImageClassification",
            num_labels=5,
            image_size=16,
            num_register_tokens=2,
            qkv_bias=False,
        ),
        functools.partial(_images, rows=12, columns=8),
        _logits,
        _our_logits,
        {
            "resize without antialias": wrong("embed.position.antialias", False),
            "mean of registers too": wrong("pool", FirstAndAverage(1)),
            "registers before the class token": as_class("embed", RegistersFirst),
        },
    ),
    Case(
        "dinov3",
        functools.partial(
            _dinov3, intermediate_size=40, num_register_tokens=2, pos_embed_jitter=1.5
        ),
        _masked_images,  # Of a larger grid than it was trained for.
        _features,
        _our_features,
        {
            "gelu by tanh": wrong("stack.block.mlp.activation", gelu_tanh),
            "epsilon": wrong("stack.block.epsilon", 1e-6),
            "last epsilon": wrong("norm.epsilon", 1e-6),
            "theta": wrong("embed.rotary.theta", 1e4),
            "angles counted from 0": wrong("embed.rotary", GridAngles(8)),
            "columns first": as_class("embed.rotary", ColumnsFirst),
            "class token and registers turned": as_class("embed", TurnedPrefix),
            "registers before the class token": as_class("embed", RegistersFirst),
            "nothing masked": _nothing_masked,
        },
        SMALL,
    ),
    Case(
        "dinov3_gated",
        functools.partial(
            _dinov3,
            hidden_act="silu",
            use_gated_mlp=True,
            intermediate_size=40,
            num_register_tokens=1,
            query_bias=False,
            value_bias=False,
        ),
        functools.partial(_images, rows=8, columns=12),
        _features,
        _our_features,
        {"gate by gelu": wrong("stack.block.mlp.activation", gelu)},
    ),
)
