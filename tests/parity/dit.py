"""DiT of diffusers."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxformer.ops.activation import gelu
from jaxformer.ops.patches import patchify, unpatchify
from jaxformer.ops.timestep import cosines_first, sines_first
from tests.parity.case import Case, wrong

TINY = {
    "num_attention_heads": 3,
    "attention_head_dim": 4,
    "in_channels": 5,
    "out_channels": 10,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 7,
}


def _original(**fields):
    import diffusers

    module = diffusers.DiTTransformer2DModel(**TINY | fields)
    # With one embedder of time and class, of which each block has a copy in the file.
    for block in module.transformer_blocks:
        block.norm1.emb = module.transformer_blocks[0].norm1.emb
    whole = module.state_dict
    module.state_dict = lambda *args, **kwargs: {
        name: tensor.clone() for name, tensor in whole(*args, **kwargs).items()
    }
    return module


def inputs(draw, size=8, channels=5, classes=7):
    return {
        "x": draw.normal(size=(3, size, size, channels)).astype("float32"),
        "t": (np.array([127, 31, 4]) / 1000).astype("float32"),  # Small, see mmdit.py.
        "label": np.array([1, classes, classes - 1]),
    }


def _theirs(module, inputs):
    x, steps = inputs["x"].permute(0, 3, 1, 2), (inputs["t"] * 1000).round().long()
    found = module(x, timestep=steps, class_labels=inputs["label"]).sample
    return {"out": found.permute(0, 2, 3, 1)}


def _ours(model, variables, inputs):
    return {"out": model.apply(variables, inputs["x"], inputs["t"], inputs["label"])}


class Changed:
    """A model that is given other parameters, or what it gives changed."""

    def __init__(self, model: Any, given: Callable = lambda p: p, made: Callable = lambda y: y):
        self.model, self.given, self.made = model, given, made

    def apply(self, variables, *args):
        params = self.given(variables["params"])
        return self.made(self.model.apply({"params": params}, *args))


def parameter(path: str, change: Callable) -> Callable:
    """A mutation: the parameters under a path are others."""

    def given(params):
        *way, last = path.split("/")
        copy = node = dict(params)
        for name in way:
            node[name] = dict(node[name])
            node = node[name]
        node[last] = {k: change(x) for k, x in node[last].items()}
        return copy

    return lambda model, inputs: (Changed(model, given), inputs)


def _columns_first(y):
    rows = patchify(y, 2).reshape(*y.shape[:1], -1, 2, 2, y.shape[-1]).swapaxes(2, 3)
    return unpatchify(rows.reshape(*rows.shape[:2], -1), 2, y.shape[1:3])


def _channels_first(y):
    rows = patchify(y, 2)
    rows = rows.reshape(*rows.shape[:2], 4, -1).swapaxes(2, 3).reshape(rows.shape)
    return unpatchify(rows, 2, y.shape[1:3])


def chunks(order):
    """Vectors of a modulation in another order: they are the axis before the last."""
    return lambda x: jnp.take(x, jnp.array(order), -2)


def _relabelled(model, inputs):
    return model, {**inputs, "label": np.where(inputs["label"] == 7, 0, inputs["label"])}


BLOCK = "stack/block/modulation/linear"
MUTATIONS = {
    "scale before shift": parameter(BLOCK, chunks((1, 0, 2, 4, 3, 5))),
    "gate first": parameter(BLOCK, chunks((2, 0, 1, 5, 3, 4))),
    "MLP before attention": parameter(BLOCK, chunks((3, 4, 5, 0, 1, 2))),
    "last scale before shift": parameter("norm/modulation/linear", chunks((1, 0))),
    "sines before cosines": wrong("condition.features", sines_first),
    "frequencies of the original": wrong("condition.features", cosines_first),
    "no class is the first": _relabelled,
    "columns before rows in a patch": lambda m, x: (Changed(m, made=_columns_first), x),
    "channels before places": lambda m, x: (Changed(m, made=_channels_first), x),
    "exact gelu": wrong("stack.block.mlp.activation", gelu),
}
# Modulations of such weights multiply roundings, and not the errors that are looked for.
CALM = {"norm1.linear": 0.3, "norm1_context.linear": 0.3, "norm_out": 0.3, "proj_out": 0.3}
CASES = (
    Case("dit", _original, inputs, _theirs, _ours, MUTATIONS, CALM),
    Case(
        "dit_epsilon",  # So large that it counts.
        functools.partial(
            _original, attention_bias=False, num_layers=1, activation_fn="gelu", norm_eps=0.01
        ),
        inputs,
        _theirs,
        _ours,
        {"one epsilon": wrong("stack.block.mlp_epsilon", None)},
        CALM,
        slow=True,
    ),
)
