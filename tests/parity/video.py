"""ViViT and VideoMAE of transformers."""

import functools

from jaxformer.layers.embed import SincosPosition
from jaxformer.layers.pool import Average, First
from jaxformer.models.video import FactoredPosition, RowSincos
from jaxformer.ops.activation import gelu, gelu_tanh
from tests.parity.case import Case, wrong

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": [8, 12],
    "num_frames": 6,
    "num_labels": 5,
}
VIVIT = TINY | {"tubelet_size": [2, 4, 4]}
VIDEOMAE = TINY | {"tubelet_size": 2, "patch_size": 4}
# In memory: what must be small for epsilon to count.
SMALL = {"embeddings": 1e-2, "o_proj": 1e-2, "fc2": 1e-2, "output.dense": 1e-2}


def _original(kind: str, task: str, **fields):
    import importlib

    library = importlib.import_module(f"transformers.models.{kind.lower()}")
    tiny = VIVIT if kind == "Vivit" else VIDEOMAE
    return getattr(library, f"{kind}{task}")(getattr(library, f"{kind}Config")(**tiny | fields))


def _frames(draw):
    return {"frames": draw.normal(size=(2, 6, 8, 12, 3)).astype("float32")}


def _logits(module, inputs):
    return {"logits": module(inputs["frames"].permute(0, 1, 4, 2, 3)).logits}


def _features(module, inputs):
    found = module(inputs["frames"].permute(0, 1, 4, 2, 3))
    pooled = {"pooled": found.pooler_output} if hasattr(found, "pooler_output") else {}
    return pooled | {"tokens": found.last_hidden_state}


def _our_logits(model, variables, inputs):
    return {"logits": model.apply(variables, inputs["frames"])}


def _our_tokens(model, variables, inputs):
    return {"tokens": model.apply(variables, inputs["frames"], method="encode")}


def _our_features(model, variables, inputs):
    pooled = model.apply(variables, inputs["frames"])
    return {"pooled": pooled} | _our_tokens(model, variables, inputs)


def _backwards(model, inputs):
    return model, {"frames": inputs["frames"][:, ::-1]}


def _in_tubelets(model, inputs):
    """The frames of each tubelet in the other order."""
    x = inputs["frames"]
    x = x.reshape(2, 3, 2, *x.shape[2:])[:, :, ::-1].reshape(x.shape)
    return model, {"frames": x}


CASES = (
    Case(
        "vivit_classify",
        functools.partial(_original, "Vivit", "ForVideoClassification"),
        _frames,
        _logits,
        _our_logits,
        {
            "gelu by erf": wrong("stack.block.mlp.activation", gelu),
            "mean of all tokens": wrong("pool", Average()),
            "time backwards": _backwards,
            "tubelets backwards": _in_tubelets,
        },
    ),
    Case(
        "vivit_model",  # Activations so small that epsilon counts.
        functools.partial(_original, "Vivit", "Model", qkv_bias=False, pooler_output_size=20),
        _frames,
        _features,
        _our_features,
        {
            "epsilon": wrong("stack.block.epsilon", 1e-5),
            "last": wrong("norm.epsilon", 1e-5),
        },
        SMALL,
    ),
    Case(
        "videomae_classify",
        functools.partial(_original, "VideoMAE", "ForVideoClassification"),
        _frames,
        _logits,
        _our_logits,
        {
            "gelu by tanh": wrong("stack.block.mlp.activation", gelu_tanh),
            "first token": wrong("pool", First()),
            "no norm of the mean": wrong("neck.epsilon", 1.0),
            "positions of time and space": wrong(
                "embed.position", FactoredPosition(SincosPosition(24), RowSincos(24))
            ),
            "time backwards": _backwards,
        },
    ),
    Case(
        "videomae_small",  # Activations so small that epsilon counts.
        functools.partial(
            _original,
            "VideoMAE",
            "ForVideoClassification",
            layer_norm_eps=1e-6,
            num_hidden_layers=1,
            qv_bias=False,
        ),
        _frames,
        _logits,
        _our_logits,
        {"the mean's": wrong("neck.epsilon", 1e-6)},
        SMALL,
    ),
    Case(
        "videomae_model",
        functools.partial(
            _original, "VideoMAE", "Model", use_mean_pooling=False, layer_norm_eps=1e-6
        ),
        _frames,
        _features,
        _our_tokens,
        {
            "epsilon": wrong("stack.block.epsilon", 1e-4),
            "last": wrong("norm.epsilon", 1e-4),
        },
    ),
)
