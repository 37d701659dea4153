"""CLIP of transformers, and its towers alone."""

import functools

from jaxformer.layers.pool import Average
from jaxformer.layers.text import AtEnd, Last
from jaxformer.ops.activation import gelu
from tests.parity.case import Case, wrong

VISION = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 12,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 14,
    "vocab_size": 19,
    "max_position_embeddings": 8,
    "eos_token_id": 5,
    "bos_token_id": 3,
    "pad_token_id": 5,
}


def _both(text=None, **vision):
    from transformers.models.clip import CLIPConfig, CLIPModel

    return CLIPModel(
        CLIPConfig(
            vision_config=VISION | vision,
            text_config=TEXT | (text or {}),
            projection_dim=10,
        )
    )


def _alone(tower, projects):
    from transformers.models import clip

    fields = {"Vision": VISION, "Text": TEXT}[tower] | {"projection_dim": 10}
    kind = f"CLIP{tower}Model" + ("WithProjection" if projects else "")
    return getattr(clip, kind)(getattr(clip, f"CLIP{tower}Config")(**fields))


def _tokens(draw):
    tokens = draw.integers(6, 19, size=(3, 7))
    tokens[:, 0] = 3
    for row, end in enumerate((6, 3, 4)):  # The first of several ends is the end.
        tokens[row, end:] = 5
    return tokens.astype("int32")


def _images(draw, rows=12, columns=12, channels=3):
    return draw.normal(size=(2, rows, columns, channels)).astype("float32")


def _inputs(draw, **options):
    return {"images": _images(draw, **options), "tokens": _tokens(draw)}


def embeddings(module, inputs, **options):
    """What a model of two towers says, embeddings and logits."""
    found = module(
        input_ids=inputs["tokens"].long(),
        pixel_values=inputs["images"].permute(0, 3, 1, 2),
        **options,
    )
    return {
        "logits": found.logits_per_image,
        "image": found.image_embeds,
        "text": found.text_embeds,
    }


def our_embeddings(model, variables, inputs):
    """The same of ours."""
    inputs = inputs["images"], inputs["tokens"]
    image, text, _, _ = model.apply(variables, *inputs, method="encode")
    return {"logits": model.apply(variables, *inputs), "image": image, "text": text}


def _vision_tokens(module, inputs):
    found = module(inputs["images"].permute(0, 3, 1, 2))
    tokens = module.post_layernorm(found.last_hidden_state)
    return {"pooled": found.pooler_output, "tokens": tokens}


def _our_vision_tokens(model, variables, inputs):
    return {
        "pooled": model.apply(variables, inputs["images"]),
        "tokens": model.apply(variables, inputs["images"], method="encode"),
    }


def _masked_text(module, inputs):
    found = module(inputs["tokens"].long(), attention_mask=inputs["real"].long())
    tokens = found.last_hidden_state
    return {"pooled": found.text_embeds, "tokens": tokens}


def _our_masked_text(model, variables, inputs):
    inputs = inputs["tokens"], inputs["real"]
    return {
        "pooled": model.apply(variables, *inputs),
        "tokens": model.apply(variables, *inputs, method="encode"),
    }


def _real(draw):
    tokens = _tokens(draw)
    real = (tokens != 5).astype("int32")
    return {"tokens": tokens, "real": real}


def _unmasked(model, inputs):
    return model, inputs | {"real": inputs["real"] * 0 + 1}


FACTS = {
    "exact gelu in images": wrong("vision.stack.block.mlp.activation", gelu),
    "exact gelu in texts": wrong("text.stack.block.mlp.activation", gelu),
    "texts see what comes": wrong("text.embed.causal", False),
    "greatest id is the end": wrong("text.pool", AtEnd()),
    "last token is the end": wrong("text.pool", Last()),
    "mean of all tokens": wrong("vision.pool", Average()),
    "antialiased resize": wrong("vision.embed.position.antialias", True),
    "bilinear resize": wrong("vision.embed.position.method", "bilinear"),
}
_SMALL = {
    "embedding": 1e-2,
    "pre_layrnorm": 1e-2,
    "out_proj": 1e-2,
    "fc2": 1e-2,
}

CASES = (
    Case(
        "clip",
        _both,
        _inputs,
        embeddings,
        our_embeddings,
        {k: f for k, f in FACTS.items() if "resize" not in k},
    ),
    Case(
        "clip_resized",  # And the end of texts as in configs of 2022, one channel.
        functools.partial(_both, {"eos_token_id": 2}, num_channels=1),
        functools.partial(_inputs, rows=16, columns=20, channels=1),
        functools.partial(embeddings, interpolate_pos_encoding=True),
        our_embeddings,
        {k: FACTS[k] for k in ("antialiased resize", "bilinear resize")}
        | {"first 5 is the end": wrong("text.pool", AtEnd(5))},
    ),
    Case(
        "clip_small",  # Activations so small that epsilon counts; the towers' differ.
        functools.partial(_both, {"layer_norm_eps": 1e-6}),
        _inputs,
        embeddings,
        our_embeddings,
        {
            "epsilon of images": wrong("vision.stack.block.epsilon", 1e-6),
            "last of images": wrong("vision.norm.epsilon", 1e-6),
            "first of images": wrong("vision.embed.norm.epsilon", 1e-6),
            "epsilon of texts": wrong("text.stack.block.epsilon", 1e-5),
            "last of texts": wrong("text.norm.epsilon", 1e-5),
        },
        _SMALL,
    ),
    Case(
        "clip_vision",
        functools.partial(_alone, "Vision", False),
        lambda draw: {"images": _images(draw)},
        _vision_tokens,
        _our_vision_tokens,
        hub=((r"^(?!vision_model\.)", "vision_model."),),
    ),
    Case(
        "clip_text",
        functools.partial(_alone, "Text", True),
        _real,
        _masked_text,
        _our_masked_text,
        {"padding is seen": _unmasked},
    ),
)
