"""Queries that read images for a language model: BLIP-2, and the OPT inside of it."""

import dataclasses
from typing import Any

from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.text import LearnedPositions
from jaxformer.ops.activation import gelu, gelu_tanh, silu
from tests.parity.case import Case, edit, wrong
from tests.parity.language import blocks

IMAGE, QUERIES = 17, 3
TEXT: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 16,
    "ffn_dim": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 14,
    "word_embed_proj_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _opt():
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(**TEXT))


def _blip2():
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=12,
            intermediate_size=14,
            num_hidden_layers=1,
            num_attention_heads=3,
            image_size=8,
            patch_size=4,
        ),
        qformer_config=Blip2QFormerConfig(
            hidden_size=10,
            intermediate_size=22,
            num_hidden_layers=3,
            num_attention_heads=2,
            vocab_size=7,
        ),
        text_config=OPTConfig(**TEXT),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    return Blip2ForConditionalGeneration(config)


def _inputs(draw):
    """A row with one image and a row with two."""
    tokens = draw.integers(3, IMAGE, size=(2, 12))
    for row, starts in enumerate(([2], [0, 5])):
        for start in starts:
            tokens[row, start : start + QUERIES] = IMAGE
    images = draw.normal(size=(2, 2, 8, 8, 3)).astype("float32")
    return {"tokens": tokens.astype("int32"), "images": images}


def _theirs(module, inputs):
    images = inputs["images"][[0, 1, 1], [0, 0, 1]].permute(0, 3, 1, 2)
    found = module(images, inputs["tokens"].long(), use_cache=False)
    return {"logits": found.logits}


def _ours(model, variables, inputs):
    return {"logits": model.apply(variables, inputs["tokens"], inputs["images"])}


def _tokens(draw):
    return {"tokens": draw.integers(3, 19, size=(2, 12)).astype("int32")}


def _in_former(change):
    """A mutation of every layer of the Q-Former."""

    def mutate(model, inputs):
        changed, _ = blocks(change)(model.connector, inputs)
        return edit(model, "connector", changed), inputs

    return mutate


def _unshifted(model):
    length, width = model.position.length, model.position.width
    return edit(model, "position", LearnedPositions(length + 2, width))


def _no_mean(block):
    return dataclasses.replace(block, norm=RMSNorm)


def _in_text(change):
    def mutate(model, inputs):
        changed, _ = change(model.language, inputs)
        return edit(model, "language", changed), inputs

    return mutate


CASES = (
    Case(
        "opt",
        _opt,
        _tokens,
        lambda module, inputs: {
            "logits": module(inputs["tokens"].long(), use_cache=False).logits
        },
        lambda model, variables, inputs: {"logits": model.apply(variables, inputs["tokens"])},
        {
            "positions begin at once": lambda model, inputs: (_unshifted(model), inputs),
            "silu": blocks(lambda block: edit(block, "mlp.activation", silu)),
            "no mean is taken": blocks(_no_mean),
            "no norm at the end": wrong("norm", None),
        },
        slow=True,
    ),
    Case(
        "blip2",
        _blip2,
        _inputs,
        _theirs,
        _ours,
        {
            "no look at the image": _in_former(lambda block: edit(block, "cross", None)),
            "the class token is left out": wrong("skip", 1),
            "no norm after images": wrong("vision.norm", None),
            "images' gelu by tanh": wrong("vision.stack.block.mlp.activation", gelu_tanh),
            "queries' gelu by tanh": _in_former(
                lambda block: edit(block, "mlp.activation", gelu_tanh)
            ),
            "queries' epsilon": _in_former(lambda block: edit(block, "epsilon", 1e-3)),
            "queries' first epsilon": wrong("connector.epsilon", 1e-3),
            "no mean in the queries": _in_former(_no_mean),
            "positions begin at once": lambda model, inputs: (
                edit(model, "language", _unshifted(model.language)),
                inputs,
            ),
            "gelu in the text": _in_text(
                blocks(lambda block: edit(block, "mlp.activation", gelu))
            ),
        },
    ),
)
