"""Language models of transformers that see: LLaVA, PaliGemma, and the Gemma inside of it."""

import numpy as np

from jaxformer.layers.gated import GatedBlock, Sighted
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.vlm import Early
from jaxformer.ops.activation import gelu, gelu_tanh
from tests.parity.case import Case, edit, wrong
from tests.parity.language import TINY, blocks

IMAGE, PATCHES = 17, 4  # The token, and what a picture of 8 x 8 pixels has.
VISION = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 14,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = TINY | {"hidden_size": 16, "intermediate_size": 18, "head_dim": 6}


def _llava(**vision):
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, **vision),
        text_config=LlamaConfig(**TEXT, rms_norm_eps=1e-5),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
    )
    return LlavaForConditionalGeneration(config)


def _paligemma():
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        SiglipVisionConfig,
    )

    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=GemmaConfig(**TEXT),
        image_token_index=IMAGE,
        vocab_size=TEXT["vocab_size"],
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
    )
    return PaliGemmaForConditionalGeneration(config)


def _idefics():
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    vision = VISION | {"embed_dim": VISION["hidden_size"], "num_hidden_layers": 1}
    del vision["hidden_size"]
    frozen = {"freeze_text_layers": False, "freeze_vision_layers": False}
    config = IdeficsConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=10,
        num_hidden_layers=4,
        num_attention_heads=2,
        cross_layer_interval=2,
        qk_layer_norms=True,
        use_resampler=True,
        pad_token_id=None,
        image_token_id=IMAGE,
        vision_config=vision,
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 3,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 4,
        },
        **frozen,
    )
    return IdeficsForVisionText2Text(config)


def _interleaved(draw):
    """Images that are one token each, after some text: one image, and two."""
    tokens = draw.integers(3, IMAGE, size=(2, 12))
    tokens[[0, 1, 1], [3, 1, 6]] = IMAGE
    images = draw.normal(size=(2, 2, 8, 8, 3)).astype("float32")
    return {"tokens": tokens.astype("int32"), "images": images}


def _theirs_interleaved(module, inputs):
    tokens = inputs["tokens"].long()
    seen = (tokens == IMAGE).cumsum(1)[..., None]
    numbers = 1 + seen.new_tensor([0, 1])[None, None]
    found = module(
        tokens,
        pixel_values=inputs["images"].permute(0, 1, 4, 2, 3),
        image_attention_mask=(seen == numbers).long(),
        use_cache=False,
    )
    return {"logits": found.logits}


def _inputs(draw):
    """A row with one image and a row with two."""
    tokens = draw.integers(3, IMAGE, size=(2, 13))
    for row, starts in enumerate(([2], [0, 6])):
        for start in starts:
            tokens[row, start : start + PATCHES] = IMAGE
    images = draw.normal(size=(2, 2, 8, 8, 3)).astype("float32")
    return {"tokens": tokens.astype("int32"), "images": images}


def _with_prefix(draw):
    prefix = np.arange(13)[None] < np.array([[8], [11]])
    return _inputs(draw) | {"prefix": prefix.astype("int32")}


def _theirs(module, inputs):
    images = inputs["images"][[0, 1, 1], [0, 0, 1]].permute(0, 3, 1, 2)
    more = {}
    if "prefix" in inputs:
        more["token_type_ids"] = 1 - inputs["prefix"].long()
    tokens = inputs["tokens"].long()
    return {"logits": module(tokens, pixel_values=images, use_cache=False, **more).logits}


def _ours(model, variables, inputs):
    more = {name: inputs[name] for name in ("prefix", "seen") if name in inputs}
    return {"logits": model.apply(variables, inputs["tokens"], inputs["images"], **more)}


class _Late(Early):
    """Runs one layer more."""

    def encode(self, *inputs, train=False):
        x = self.encoder.encode(*inputs, train=train)
        return self.rest[0](x)


def _late(model, inputs):
    return edit(model, "vision", _Late(model.vision.encoder, model.vision.rest)), inputs


class _Shut(GatedBlock):
    """Lets no image in."""

    def __call__(self, x, **inputs):
        return x


def _fields(block):
    return block.attention, block.mlp, block.norm, block.epsilon


def _in_gated(change):
    def mutate(model, inputs):
        gated, *layers = model.language.stack.block.parts
        chain = Sighted((change(gated), *layers))
        return edit(model, "language.stack.block", chain), inputs

    return mutate


def _all_images(model, inputs):
    """Every token sees the last image of its row."""
    tokens = inputs["tokens"]
    last = (tokens == IMAGE).sum(1, keepdims=True)
    return model, inputs | {"seen": np.broadcast_to(last, tokens.shape).astype("int32")}


def _plain(model, inputs):
    language, _ = blocks(lambda block: edit(block, "norm", RMSNorm))(model.language, inputs)
    return edit(model, "language", language), inputs


def _prefix(change):
    return lambda model, inputs: (model, inputs | {"prefix": change(inputs["prefix"])})


CASES = (
    Case(
        "llava",
        _llava,
        _inputs,
        _theirs,
        _ours,
        {
            "the last layer": _late,
            "the class token stays": wrong("skip", 0),
            "the projector's gelu by tanh": wrong("connector.activation", gelu_tanh),
            "exact gelu in images": wrong("vision.encoder.stack.block.mlp.activation", gelu),
        },
        hub=((r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),),
    ),
    Case(
        "paligemma",
        _paligemma,
        _with_prefix,
        _theirs,
        _ours,
        {
            "the prefix is causal": _prefix(lambda x: x * 0),
            "all see all": _prefix(lambda x: x * 0 + 1),
            "vectors as they are": wrong("language.table.scale", 1.0),
            "plain norms": _plain,
            "exact gelu in images": wrong("vision.stack.block.mlp.activation", gelu),
            "no norm after images": wrong("vision.norm", None),
        },
        hub=((r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),),
    ),
    Case(
        "idefics",
        _idefics,
        _interleaved,
        _theirs_interleaved,
        _ours,
        {
            "no gates": _in_gated(lambda block: _Shut(*_fields(block))),
            "the queries' norm": _in_gated(
                lambda block: edit(block, "attention.qk_norm", None)
            ),
            "all see the last image": _all_images,
            "gelu in the resampler": wrong("connector.stack.block.mlp.activation", gelu),
            "the class token is left out": wrong("skip", 1),
            "exact gelu in images by tanh": wrong(
                "vision.encoder.stack.block.mlp.activation", gelu_tanh
            ),
        },
    ),
)
