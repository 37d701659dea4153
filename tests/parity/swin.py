"""Swin of transformers."""

import dataclasses
import functools

from jaxformer.models.swin import Merge, WindowAttention
from jaxformer.ops.activation import gelu_tanh
from tests.parity.case import Case, edit, wrong

TINY = {
    "embed_dim": 6,
    "depths": [4, 2, 2],
    "num_heads": [2, 3, 4],
    "window_size": 3,
    "mlp_ratio": 1.5,
    "image_size": [19, 28],  # 10 x 14, 5 x 7 and 3 x 4 tokens: each is filled up.
    "patch_size": 2,
    "num_labels": 5,
}


def _original(task: str, **fields):
    from transformers.models import swin

    return getattr(swin, f"Swin{task}")(swin.SwinConfig(**TINY | fields))


def _images(draw, rows=19, columns=28):
    return {"images": draw.normal(size=(2, rows, columns, 3)).astype("float32")}


def _logits(module, inputs):
    return {"logits": module(inputs["images"].permute(0, 3, 1, 2)).logits}


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


def _blocks(change):
    """A mutation: every block is changed."""

    def mutate(model, inputs):
        stages = tuple(
            dataclasses.replace(
                stack,
                block=dataclasses.replace(
                    stack.block,
                    first=change(stack.block.first),
                    second=change(stack.block.second),
                ),
            )
            for stack in model.stack.stages
        )
        return edit(model, "stack.stages", stages), inputs

    return mutate


def _attention(kind: type[WindowAttention]):
    def change(block):
        fields = {
            f.name: getattr(block.attention, f.name)
            for f in dataclasses.fields(block.attention)
            if f.init and f.name not in ("parent", "name")
        }
        return dataclasses.replace(block, attention=kind(**fields))

    return _blocks(change)


class KeyFromQuery(WindowAttention):
    def distances(self):
        return super().distances().T


class ColumnsFirst(WindowAttention):
    def distances(self):
        w = self.window
        rows, columns = divmod(super().distances(), 2 * w - 1)
        return columns * (2 * w - 1) + rows


class NoRegions(WindowAttention):
    def regions(self, whole):
        return 0 * super().regions(whole)


class RowsFirst(Merge):
    @property
    def order(self):
        return (2, 4)


class WrongMerge(Merge):
    epsilon: float = 1e-6


CASES = (
    Case(
        "swin_classify",
        functools.partial(_original, "ForImageClassification"),
        _images,
        _logits,
        _our_logits,
        {
            "gelu by tanh": _blocks(lambda b: edit(b, "mlp.activation", gelu_tanh)),
            "no shift": _blocks(lambda b: edit(b, "attention.shift", 0)),
            "another shift": _blocks(
                lambda b: edit(b, "attention.shift", 2 * b.attention.shift)
            ),
            "distance of key from query": _attention(KeyFromQuery),
            "columns before rows": _attention(ColumnsFirst),
            "no mask between regions": _attention(NoRegions),
            "merged row by row": wrong("stack.merge", RowsFirst),
        },
    ),
    Case(
        "swin_small",  # Activations so small that epsilon counts.
        functools.partial(
            _original,
            "ForImageClassification",
            depths=[2, 2],
            num_heads=[2, 3],
            layer_norm_eps=1e-6,
            qkv_bias=False,
        ),
        functools.partial(_images, rows=14, columns=14),
        _logits,
        _our_logits,
        {
            "blocks": _blocks(lambda b: edit(b, "epsilon", 1e-5)),
            "last": wrong("norm.epsilon", 1e-5),
            "embedding": wrong("embed.embed.norm.epsilon", 1e-6),
            "merge": wrong("stack.merge", WrongMerge),
        },
        {"embeddings": 1e-2, "o_proj": 1e-2, "fc2": 1e-2, "reduction": 1e-2},
    ),
    Case(
        "swin_model",
        functools.partial(_original, "Model", depths=[2, 2], num_heads=[2, 3]),
        _images,
        _features,
        _our_features,
    ),
)
