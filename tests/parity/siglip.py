"""SigLIP and SigLIP 2 (NaFlex) of transformers, and towers of theirs alone."""

import functools
import importlib

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxformer.layers.embed import GridPosition
from jaxformer.layers.pack import PackedAverage, PackedPosition
from jaxformer.layers.pool import Average
from jaxformer.layers.text import AtEnd
from jaxformer.ops.activation import gelu
from tests.parity.case import Case, wrong
from tests.parity.clip import embeddings, our_embeddings

VISION = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 14,
    "vocab_size": 19,
    "max_position_embeddings": 6,
    "projection_size": 12,
    "bos_token_id": 3,
    "eos_token_id": 5,
    "pad_token_id": 1,
}


def _both(kind="Siglip", text=None, **vision):
    library = importlib.import_module(f"transformers.models.{kind.lower()}")
    config = getattr(library, f"{kind}Config")(
        vision_config=VISION | vision, text_config=TEXT | (text or {})
    )
    return getattr(library, f"{kind}Model")(config)


def _alone(kind, tower, **fields):
    library = importlib.import_module(f"transformers.models.{kind.lower()}")
    fields = {"Vision": VISION, "Text": TEXT}[tower] | fields
    config = getattr(library, f"{kind}{tower}Config")(**fields)
    return getattr(library, f"{kind}{tower}Model")(config)


def _inputs(draw, rows=12, columns=12):
    return {
        "images": draw.normal(size=(2, rows, columns, 3)).astype("float32"),
        "tokens": draw.integers(0, 19, size=(3, 5)).astype("int32"),
    }


GRIDS = np.array([[2, 3], [4, 2], [1, 5]], "int32")


def _patches(draw, with_text=True):
    patches = draw.normal(size=(3, 8, 48)).astype("float32")
    grids = {"grids": GRIDS[:, None], "patches": patches}
    tokens = draw.integers(0, 19, size=(2, 5)).astype("int32")
    return grids | ({"tokens": tokens} if with_text else {})


def _real():
    return (np.arange(8)[None] < GRIDS.prod(1)[:, None])[..., None]


def _packed(inputs):
    import torch

    return {
        "pixel_values": inputs["patches"],
        "spatial_shapes": inputs["grids"][:, 0].long(),
        "pixel_attention_mask": torch.from_numpy(_real()[..., 0]).long(),
    }


def _naflex(module, inputs):
    found = module(input_ids=inputs["tokens"].long(), **_packed(inputs))
    return {
        "logits": found.logits_per_image,
        "image": found.image_embeds,
        "text": found.text_embeds,
    }


def _our_naflex(model, variables, inputs):
    inputs = inputs["patches"], inputs["grids"], inputs["tokens"]
    image, text, _, _ = model.apply(variables, *inputs, method="encode")
    return {"logits": model.apply(variables, *inputs), "image": image, "text": text}


def _naflex_tokens(module, inputs):
    import torch

    found = module(**_packed(inputs))
    real = torch.from_numpy(_real())
    return {"tokens": torch.where(real, found.last_hidden_state, 0)}


def _our_naflex_tokens(model, variables, inputs):
    inputs = inputs["patches"], inputs["grids"]
    tokens = model.apply(variables, *inputs, method="encode")
    return {"tokens": np.where(_real(), 1, 0) * tokens}


def _vision_tokens(module, inputs):
    found = module(inputs["images"].permute(0, 3, 1, 2))
    return {"pooled": found.pooler_output, "tokens": found.last_hidden_state}


def _our_vision_tokens(model, variables, inputs):
    return {
        "pooled": model.apply(variables, inputs["images"]),
        "tokens": model.apply(variables, inputs["images"], method="encode"),
    }


def _text_tokens(module, inputs):
    found = module(inputs["tokens"].long(), attention_mask=inputs["real"].long())
    return {"pooled": found.pooler_output, "tokens": found.last_hidden_state}


def _our_text_tokens(model, variables, inputs):
    inputs = inputs["tokens"], inputs["real"]
    return {
        "pooled": model.apply(variables, *inputs),
        "tokens": model.apply(variables, *inputs, method="encode"),
    }


def _padded(draw):
    tokens = draw.integers(0, 19, size=(3, 5)).astype("int32")
    real = (np.arange(5)[None] < np.array([[3], [5], [2]])).astype("int32")
    return {"tokens": tokens, "real": real}


def _unmasked(model, inputs):
    return model, inputs | {"real": inputs["real"] * 0 + 1}


def _turned(model, inputs):
    return model, inputs | {"grids": inputs["grids"][..., ::-1]}


class Resized(PackedPosition):
    """Positions of each image by another way to resize, which is wrong."""

    method: str = "bilinear"
    antialias: bool = False

    def setup(self):
        same = {"method": self.method, "antialias": self.antialias}
        self.grid = GridPosition(self.width, self.shape, **same)
        nn.share_scope(self, self.grid)

    def __call__(self, at):
        rows = [self.grid(*grid) for grid in GRIDS.tolist()]
        return jnp.stack([jnp.pad(x, ((0, 8 - len(x)), (0, 0))) for x in rows])


FACTS = {
    "exact gelu in images": wrong("vision.stack.block.mlp.activation", gelu),
    "exact gelu in the head": wrong("vision.pool.mlp.activation", gelu),
    "exact gelu in texts": wrong("text.stack.block.mlp.activation", gelu),
    "texts see only what was": wrong("text.embed.causal", True),
    "greatest id is the end": wrong("text.pool", AtEnd()),
}
EPSILONS = {
    "epsilon of images": wrong("vision.stack.block.epsilon", 1e-6),
    "last of images": wrong("vision.norm.epsilon", 1e-6),
    "epsilon of the head": wrong("vision.pool.epsilon", 1e-6),
    "epsilon of texts": wrong("text.stack.block.epsilon", 1e-5),
    "last of texts": wrong("text.norm.epsilon", 1e-5),
}
_SMALL = {"embedding": 1e-2, "out_proj": 1e-2, "fc2": 1e-2}
_HUB = {name: ((rf"^(?!{name}_model\.)", f"{name}_model."),) for name in ("vision", "text")}

CASES = (
    Case(
        "siglip",
        functools.partial(_both, image_size=12),
        _inputs,
        embeddings,
        our_embeddings,
        FACTS | {"mean of all tokens": wrong("vision.pool", Average())},
    ),
    Case(
        "siglip_resized",
        functools.partial(_both, image_size=12),
        functools.partial(_inputs, rows=16, columns=20),
        functools.partial(embeddings, interpolate_pos_encoding=True),
        our_embeddings,
        {
            "antialiased resize": wrong("vision.embed.position.antialias", True),
            "bilinear resize": wrong("vision.embed.position.method", "bilinear"),
        },
    ),
    Case(
        "siglip_small",  # Activations so small that epsilon counts; the towers' differ.
        functools.partial(_both, image_size=12, layer_norm_eps=1e-5),
        _inputs,
        embeddings,
        our_embeddings,
        EPSILONS,
        _SMALL,
    ),
    Case(
        "siglip_vision",
        functools.partial(_alone, "Siglip", "Vision", image_size=14),  # As 384 of 14 each.
        lambda draw: {"images": _inputs(draw, rows=14, columns=14)["images"]},
        _vision_tokens,
        _our_vision_tokens,
        hub=_HUB["vision"],
    ),
    Case(
        "siglip_text",
        functools.partial(_alone, "Siglip", "Text"),
        _padded,
        _text_tokens,
        _our_text_tokens,
        {"padding is seen": _unmasked},
        hub=_HUB["text"],
    ),
    Case(
        "siglip2",
        functools.partial(_both, "Siglip2", num_patches=9),
        _patches,
        _naflex,
        _our_naflex,
        {
            "exact gelu in the head": FACTS["exact gelu in the head"],
            "mean of all tokens": wrong("vision.pool", PackedAverage()),
            "turned": _turned,
            "resize without antialias": wrong("vision.embed.position", Resized(12, (3, 3))),
            "bicubic resize": wrong(
                "vision.embed.position", Resized(12, (3, 3), "bicubic", antialias=True)
            ),
        },
    ),
    Case(
        "siglip2_small",
        functools.partial(_both, "Siglip2", num_patches=9, layer_norm_eps=1e-5),
        _patches,
        _naflex,
        _our_naflex,
        {k: EPSILONS[k] for k in ("last of images", "epsilon of the head")},
        _SMALL,
    ),
    Case(
        "siglip2_headless",
        functools.partial(_alone, "Siglip2", "Vision", num_patches=9, vision_use_head=False),
        functools.partial(_patches, with_text=False),
        _naflex_tokens,
        _our_naflex_tokens,
        hub=_HUB["vision"],
    ),
)
