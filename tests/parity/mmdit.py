"""MMDiT of diffusers: Stable Diffusion 3 and Qwen-Image."""

import functools

import jax.numpy as jnp
import numpy as np

from jaxformer.layers.norm import BareLayerNorm
from jaxformer.layers.timestep import AdaNorm
from jaxformer.models.mmdit import JointAngles
from jaxformer.ops.activation import gelu
from jaxformer.ops.rotary import angles_of_axes
from tests.parity.case import Case, edit, wrong
from tests.parity.dit import CALM, Changed, chunks, parameter

SD3 = {
    "sample_size": 12,
    "patch_size": 2,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 3,
    "attention_head_dim": 4,
    "num_attention_heads": 2,
    "joint_attention_dim": 5,
    "caption_projection_dim": 8,
    "pooled_projection_dim": 7,
    "pos_embed_max_size": 9,
}
QWEN = {
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 3,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 1,
    "joint_attention_dim": 5,
    "axes_dims_rope": (2, 4, 6),
}


def _sd3(**fields):
    import diffusers

    return diffusers.SD3Transformer2DModel(**SD3 | fields)


def _qwen():
    import diffusers

    return diffusers.QwenImageTransformer2DModel(**QWEN)


def _given(draw, rows=6, columns=10, pooled=True):
    found = {
        "x": draw.normal(size=(2, rows, columns, 3)),
        # Small: processors differ by an ulp of a frequency, which counts 1,000 t times.
        "t": np.array([0.03125, 0.0078125]),
        "text": draw.normal(size=(2, 4, 5)),
    }
    if pooled:
        found["pooled"] = draw.normal(size=(2, 7))
    found = {k: v.astype("float32") for k, v in found.items()}
    if not pooled:
        found["real"] = np.array([[True] * 4, [True, True, True, False]])
    return found


def _sd3_theirs(module, inputs):
    found = module(
        hidden_states=inputs["x"].permute(0, 3, 1, 2),
        encoder_hidden_states=inputs["text"],
        pooled_projections=inputs["pooled"],
        timestep=inputs["t"] * 1000,
    )
    return {"out": found.sample.permute(0, 2, 3, 1)}


def _qwen_theirs(module, inputs):
    """Their model is given patches: as their pipeline makes them."""
    x = inputs["x"]
    B, Y, X, C = x.shape
    packed = x.reshape(B, Y // 2, 2, X // 2, 2, C).permute(0, 1, 3, 5, 2, 4)
    found = module(
        hidden_states=packed.reshape(B, Y * X // 4, 4 * C),
        encoder_hidden_states=inputs["text"],
        encoder_hidden_states_mask=inputs["real"],
        timestep=inputs["t"],
        img_shapes=[[(1, Y // 2, X // 2)]] * B,
    )
    out = found.sample.reshape(B, Y // 2, X // 2, C, 2, 2).permute(0, 1, 4, 2, 5, 3)
    return {"out": out.reshape(B, Y, X, C)}


def _ours(model, variables, inputs):
    order = ("x", "t", "text", "pooled", "real")
    given = [inputs.get(name) for name in order]
    return {"out": model.apply(variables, *given)}


class FromTheCorner(JointAngles):
    """Rows and columns counted from 0, and the text after them."""

    def __call__(self, y, x, text):
        rows, columns = np.mgrid[:y, :x].reshape(2, -1)
        image = (0 * rows, rows, columns)
        words = (max(y, x) + np.arange(text),) * 3
        parts = [angles_of_axes(tuple(map(jnp.asarray, p)), self.sizes) for p in (image, words)]
        return jnp.concatenate(parts)


class TextInARow(JointAngles):
    """The text goes along its frames, and not on the diagonal."""

    def __call__(self, y, x, text):
        found = super().__call__(y, x, text)
        start = jnp.full(text, max(y // 2, x // 2))
        words = angles_of_axes((start + jnp.arange(text), start, start), self.sizes)
        return jnp.concatenate([found[: y * x], words])


def _unmasked(model, inputs):
    return model, {**inputs, "real": np.ones_like(inputs["real"])}


def _cornered(model, inputs):
    """Positions of the table's corner, not of its middle."""

    def given(params):
        bias = params["embed"]["position"]["bias"]
        table = jnp.roll(bias.reshape(9, 9, -1), (3, 2), (0, 1)).reshape(bias.shape)
        embed = {**params["embed"], "position": {"bias": table}}
        return {**params, "embed": embed}

    return Changed(model, given), inputs


CASES = (
    Case(
        "sd3",
        _sd3,
        _given,
        _sd3_theirs,
        _ours,
        {
            "scale before shift": parameter(
                "stack/parts_0/block/text_modulation/linear", chunks((1, 0, 2, 4, 3, 5))
            ),
            "last text's shift before scale": parameter(
                "stack/parts_1/block/text_modulation/linear", chunks((1, 0))
            ),
            "last shift before scale": wrong("norm", AdaNorm(BareLayerNorm())),
            "corner of the positions": _cornered,
        },
        CALM,
    ),
    Case(
        "sd35",
        functools.partial(_sd3, qk_norm="rms_norm", dual_attention_layers=(0,), num_layers=3),
        functools.partial(_given, rows=10, columns=6),
        _sd3_theirs,
        _ours,
        {
            "own attention's vectors first": parameter(
                "stack/parts_0/block/image_modulation/linear",
                chunks((6, 7, 8, 3, 4, 5, 0, 1, 2)),
            ),
            "exact gelu": lambda m, x: (
                edit(
                    m,
                    "stack.parts",
                    tuple(edit(p, "block.mlp.activation", gelu) for p in m.stack.parts),
                ),
                x,
            ),
        },
        CALM,
        slow=True,
    ),
    Case(
        "qwen_image",
        _qwen,
        functools.partial(_given, pooled=False),
        _qwen_theirs,
        _ours,
        {
            "counted from the corner": wrong("angles", FromTheCorner((2, 4, 6))),
            "text in a row": wrong("angles", TextInARow((2, 4, 6))),
            "axes in another order": wrong("angles.sizes", (6, 4, 2)),
            "padding is seen": _unmasked,
            "no norm of queries": wrong("stack.block.qk_norm", None),
        },
    ),
)
