"""More models of transformers that see: Gemma 3, InternVL, LLaVA-NeXT."""

import numpy as np

from jaxformer.data.tiles import order
from jaxformer.layers.block import Chain
from jaxformer.layers.connect import Merge
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.vlm import VLM
from jaxformer.ops.activation import gelu, gelu_tanh
from tests.parity.case import Case, edit, wrong
from tests.parity.language import TINY, blocks
from tests.parity.vlm import IMAGE, PATCHES, VISION, _inputs, _ours, _theirs

TEXT = TINY | {"hidden_size": 16, "intermediate_size": 18, "head_dim": 6}
FINE = VISION | {"patch_size": 2, "num_hidden_layers": 2}  # 4 x 4 patches, 4 features.
HUB = ((r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),)
TILE, SIDE, TILES, LENGTH = 8, 2, 5, 16
PINPOINTS = ((8, 16), (16, 8), (16, 16))
SIZES = ((6, 14), (16, 10))  # One in two tiles, and one that leaves out two columns of four.


def _gemma3():
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    text = TEXT | {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 9,
        "rope_parameters": {
            "full_attention": {"rope_theta": 5e2, "rope_type": "linear", "factor": 2.0},
            "sliding_attention": {"rope_theta": 5e1, "rope_type": "default"},
        },
    }
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**FINE, vision_use_head=False),
        text_config=Gemma3TextConfig(**text),
        image_token_index=IMAGE,
        mm_tokens_per_image=PATCHES,
    )
    return Gemma3ForConditionalGeneration(config)


def _theirs_whole(module, inputs):
    images = inputs["images"][[0, 1, 1], [0, 0, 1]].permute(0, 3, 1, 2)
    tokens = inputs["tokens"].long()
    kinds = (tokens == IMAGE).long()
    found = module(tokens, pixel_values=images, use_cache=False, token_type_ids=kinds)
    return {"logits": found.logits}


def _internvl():
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        Qwen2Config,
    )

    sizes = {"hidden_size": 18, "num_attention_heads": 3, "num_key_value_heads": 1}
    text = TINY | {"intermediate_size": 20} | sizes
    del text["head_dim"]
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**FINE, attention_bias=True),
        text_config=Qwen2Config(**text),
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
    )
    return InternVLForConditionalGeneration(config)


def _llava_next():
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT | {"max_position_embeddings": 32}),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        image_grid_pinpoints=[list(size) for size in PINPOINTS],
    )
    return LlavaNextForConditionalGeneration(config)


def _tiled(draw):
    """A row with an image of three tiles and a row with one of five, base tiles among them."""
    law = {"among": PINPOINTS, "tile": TILE, "side": SIDE, "tiles": TILES, "length": LENGTH}
    orders = np.stack([order([size], **law) for size in SIZES])
    tokens = draw.integers(3, IMAGE, size=(2, 19))
    for row, start in enumerate((2, 1)):
        tokens[row, start : start + (orders[row] >= 0).sum()] = IMAGE
    tiles = draw.normal(size=(2, TILES, TILE, TILE, 3)).astype("float32")
    return {"tokens": tokens.astype("int32"), "tiles": tiles, "order": orders}


def _theirs_tiled(module, inputs):
    import torch

    found = module(
        inputs["tokens"].long(),
        pixel_values=inputs["tiles"].permute(0, 1, 4, 2, 3),
        image_sizes=torch.tensor(SIZES),
        use_cache=False,
    )
    return {"logits": found.logits}


def _ours_tiled(model, variables, inputs):
    args = (inputs[name] for name in ("tokens", "tiles", "order"))
    return {"logits": model.apply(variables, *args)}


class _Columns(Merge):
    """Of a group, the channels of its first column come first."""

    def __call__(self, x):
        B, _, C = x.shape
        found = super().__call__(x)
        return found.reshape(B, -1, 2, 2, C).swapaxes(2, 3).reshape(found.shape)


def _connector(change):
    def mutate(model, inputs):
        return edit(model, "connector", Chain(change(*model.connector.parts))), inputs

    return mutate


def _causal(model, inputs):
    return VLM(model.vision, model.connector, model.language, model.image), inputs


def _language(change):
    def mutate(model, inputs):
        language, _ = blocks(change)(model.language, inputs)
        return edit(model, "language", language), inputs

    return mutate


def _orders(change):
    return lambda model, inputs: (model, inputs | {"order": change(np.array(inputs["order"]))})


def _no_lines(found):
    return np.where(found == TILES * SIDE**2, 0, found)


def _tile_by_tile(found):
    """Tiles one after the other, and not line by line."""
    found = found.copy()
    for row in found:
        own = (row >= SIDE**2) & (row < TILES * SIDE**2)
        row[own] = np.sort(row[own])
    return found


CASES = (
    Case(
        "gemma3_vlm",
        _gemma3,
        _inputs,
        _theirs_whole,
        _ours,
        {
            "images are causal": _causal,
            "plain norm of images": _connector(lambda p, n, o: (p, RMSNorm(n.epsilon), o)),
            "epsilon of images": _connector(lambda p, n, o: (p, edit(n, "epsilon", 1e-2), o)),
            "vectors as they are": wrong("language.table.scale", 1.0),
            "exact gelu in images": wrong("vision.stack.block.mlp.activation", gelu),
            "no norm after images": wrong("vision.norm", None),
            "a window less": _language(
                lambda b: edit(b, "attention.scores.window", b.attention.scores.window and 4)
            ),
        },
        hub=HUB,
        slow=True,
    ),
    Case(
        "internvl",
        _internvl,
        _inputs,
        _theirs,
        _ours,
        {
            "columns first": _connector(lambda m, n, o: (_Columns(m.side), n, o)),
            "the projector's gelu by tanh": _connector(
                lambda m, n, o: (m, n, edit(o, "activation", gelu_tanh))
            ),
            "the projector's epsilon": _connector(
                lambda m, n, o: (m, edit(n, "epsilon", 1e-2), o)
            ),
            "no scale of layers": wrong("vision.stack.block.layer_scale", None),
            "gelu by tanh in images": wrong("vision.stack.block.mlp.activation", gelu_tanh),
        },
        slow=True,
    ),
    Case(
        "llava_next",
        _llava_next,
        _tiled,
        _theirs_tiled,
        _ours_tiled,
        {
            "no new lines": _orders(_no_lines),
            "tile by tile": _orders(_tile_by_tile),
            "the base tile alone": _orders(lambda x: np.where(x < 0, x, x % SIDE**2)),
            "the projector's gelu by tanh": wrong("connector.activation", gelu_tanh),
        },
        hub=HUB,
        slow=True,
    ),
)
