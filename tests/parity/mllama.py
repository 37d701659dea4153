"""Llama 3.2 Vision: images of tiles, two side by side and one later, and words before any."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxformer.layers.gated import GatedBlock, ServedBlock, Sighted
from jaxformer.layers.tiles import Served
from jaxformer.models import mllama
from jaxformer.ops.activation import gelu_tanh
from tests.parity.case import Case, edit, wrong
from tests.parity.vlm import _fields, _Shut

IMAGE, TILES, SIDE = 20, 3, 8
RATIOS = [[1, 1], [1, 2], [2, 1], [1, 3]]
COUNTS = np.array([1, 1, 2, 2, 3])


def _original():
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import (
        MllamaTextConfig,
        MllamaVisionConfig,
    )

    vision = MllamaVisionConfig(
        hidden_size=12,
        num_hidden_layers=4,
        num_global_layers=1,
        attention_heads=3,
        intermediate_size=14,
        vision_output_dim=36,
        image_size=SIDE,
        patch_size=4,
        max_num_tiles=TILES,
        intermediate_layers_indices=[0, 2],
        supported_aspect_ratios=RATIOS,
    )
    text = MllamaTextConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=18,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1, 3],
        max_position_embeddings=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e2,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return MllamaForConditionalGeneration(config)


def _inputs(draw):
    """A row with one image, and one with two side by side and a third of padding."""
    tokens = draw.integers(3, 19, size=(2, 12))
    tokens[[0, 1, 1, 1], [2, 1, 2, 6]] = IMAGE
    images = draw.normal(size=(2, 3, TILES, SIDE, SIDE, 3)).astype("float32")
    ratios = np.array([[2, 0, 0], [4, 1, 3]])
    # What stands in the place of tiles that are not there is seen all the same.
    return {
        "tokens": tokens.astype("int32"),
        "images": images,
        "ratios": ratios.astype("int32"),
    }


def _theirs(module, inputs):
    import torch

    tokens, ratios = inputs["tokens"].long(), inputs["ratios"].long()
    tiles = torch.arange(TILES) < torch.from_numpy(COUNTS)[ratios][..., None]
    # The images of each token, as their processor has it: those side by side are one.
    seen = mllama.neighbours(jnp.asarray(tokens.numpy()) == IMAGE)
    first, last = (torch.from_numpy(np.array(seen[..., i]))[..., None] for i in (0, 1))
    number = torch.arange(1, 4)
    looks = (number >= first) & (number <= last)
    found = module(
        tokens,
        pixel_values=inputs["images"].permute(0, 1, 2, 5, 3, 4),
        aspect_ratio_ids=ratios,
        aspect_ratio_mask=tiles.long(),
        cross_attention_mask=(looks[..., None] & tiles[:, None]).long(),
        use_cache=False,
    )
    return {"logits": found.logits}


def _ours(model, variables, inputs):
    more = {"seen": inputs["seen"]} if "seen" in inputs else {}
    given = (inputs[name] for name in ("tokens", "images", "ratios"))
    return {"logits": model.apply(variables, *given, **more)}


class _InBlocks(mllama.TiledEncoder):
    """Lays the looks one after the other, and not channel by channel."""

    def encode(self, images, number, *, train=False):
        x = super().encode(images, number, train=train)
        D, m = self.embed.width, len(self.local) - 1
        looks = x[..., D:].reshape(*x.shape[:2], D, m).swapaxes(2, 3)
        return jnp.concatenate([x[..., :D], looks.reshape(*x.shape[:2], -1)], -1)


class _Plain(GatedBlock):
    """Gives tokens without an image nothing."""

    def __call__(self, x, *, context, context_mask=None, **inputs):
        y = super().__call__(x, context=context, context_mask=context_mask, **inputs)
        assert isinstance(context_mask, Served)
        return jnp.where(context_mask.blind[..., None], x, y)


class _Nothing(nn.Module):
    """In the place of a norm."""

    def __call__(self, x):
        return x


def _vision(kind):
    def mutate(model, inputs):
        fields = {f.name: getattr(model.vision, f.name) for f in dataclasses.fields(kind)}
        fields = {k: v for k, v in fields.items() if k not in ("parent", "name")}
        return edit(model, "vision", kind(**fields)), inputs

    return mutate


def _served(change):
    """A mutation of each layer that looks at images."""

    def walk(node):
        if isinstance(node, ServedBlock):
            return change(node)
        if isinstance(node, Sighted):
            return Sighted(tuple(map(walk, node.parts)))
        return edit(node, "block", walk(node.block)) if hasattr(node, "depth") else node

    def mutate(model, inputs):
        return edit(model, "language.stack", walk(model.language.stack)), inputs

    return mutate


def _one_image(model, inputs):
    """Only the last of images side by side is seen."""
    seen = mllama.neighbours(jnp.asarray(inputs["tokens"]) == IMAGE)
    return model, inputs | {"seen": np.array(seen[..., [1, 1]])}


def _ratios(model, inputs):
    return model, inputs | {"ratios": inputs["ratios"] * 0 + 4}


def _blank(model, inputs):
    """Tiles that are not there are black."""
    tiles = np.arange(TILES) < COUNTS[inputs["ratios"]][..., None]
    return model, inputs | {"images": inputs["images"] * tiles[..., None, None, None]}


def _gelu_by_tanh(model, inputs):
    local = (edit(stack, "block.mlp.activation", gelu_tanh) for stack in model.vision.local)
    model = edit(model, "vision.local", tuple(local))
    return wrong("vision.whole.block.mlp.activation", gelu_tanh)(model, inputs)


def _wide(model, inputs):
    return edit(model, "vision.multiple", 1), inputs


CASES = (
    Case(
        "mllama",
        _original,
        _inputs,
        _theirs,
        _ours,
        {
            "looks one after the other": _vision(_InBlocks),
            "gates are shut": _served(lambda block: _Shut(*_fields(block))),
            "tokens without an image get nothing": _served(
                lambda block: _Plain(*_fields(block))
            ),
            "tokens without an image get the MLP": _served(
                lambda block: GatedBlock(*_fields(block))
            ),
            "no norm of queries": _served(lambda block: edit(block, "attention.qk_norm", None)),
            "images side by side are one each": _one_image,
            "another ratio": _ratios,
            "padding is black": _blank,
            "no padding of tokens": _wide,
            "gelu by tanh": _gelu_by_tanh,
            "no norm between the encoders": wrong("vision.norm", _Nothing()),
        },
        # A gate's random number has a deviation of 0.3; tables of ratios are wide.
        {"tile_embedding": 3.0, "tile_positional_embedding.embedding": 3.0},
        slow=True,
    ),
)
