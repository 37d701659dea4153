"""Gemma 3 with images of transformers: `Gemma3ForConditionalGeneration`.

SigLIP's tokens after its last norm, their means over squares, a norm and a linear layer whose
tensor lies as ours does.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxformer.convert import gemma, parts, siglip
from jaxformer.convert.config import number
from jaxformer.convert.engine import Entry
from jaxformer.convert.vlm import PROJECTOR, Kind
from jaxformer.errors import InputError
from jaxformer.layers.block import Chain
from jaxformer.layers.connect import Pool, Project
from jaxformer.layers.norm import OneRMSNorm
from jaxformer.models.gemma_vlm import GemmaVLM

# What a config of the text leaves out, as the hub's do.
_TEXT = {"hidden_size": 2304, "num_attention_heads": 8}


class _Gemma3(Kind):
    """Means of tokens, and images that see themselves whole."""

    @property
    def module(self):
        return GemmaVLM

    def text(self, config: Mapping[str, Any]):
        family, told = super().text(config)
        window = told.get("sliding_window")
        count = number(config, "mm_tokens_per_image", 256)
        if isinstance(window, int) and window < count:
            raise InputError(
                f"config.json: mm_tokens_per_image={count} is more than "
                f"sliding_window={window}; images larger than a window are not known"
            )
        return family, _TEXT | told

    def knows(self, connector):
        kinds = [type(part) for part in getattr(connector, "parts", ())]
        return kinds == [Pool, OneRMSNorm, Project]

    def join(self, config, tower, width, dtype):
        rows, columns = tower.embed.position.shape
        count = number(config, "mm_tokens_per_image", 256)
        side = math.isqrt(count)
        if side**2 != count or rows % side or rows != columns:
            raise InputError(
                f"config.json: mm_tokens_per_image={count} must be the square of a number that "
                f"divides the {rows} x {columns} patches of an image"
            )
        epsilon = tower.stack.block.epsilon
        linear = Project(width, use_bias=False, dtype=dtype)
        return tower, Chain((Pool(rows // side), OneRMSNorm(epsilon), linear)), 0

    def tower_of(self, model):
        return model.vision

    def told(self, model):
        pool, _, _ = model.connector.parts
        position = getattr(getattr(model.vision, "embed", None), "position", None)
        shape = getattr(position, "shape", None)
        if shape is None or model.skip:
            return None
        return {"mm_tokens_per_image": (shape[0] // pool.side) ** 2}

    def projector(self, connector):
        weight = f"{PROJECTOR}mm_input_projection_weight"
        return [
            *parts.norm("connector/parts_1", f"{PROJECTOR}mm_soft_emb_norm", bias=False),
            Entry("connector/parts_2/out/kernel", weight, "I O -> I O"),
        ]


GEMMA3_VLM = _Gemma3(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    siglip.SIGLIP_VISION,
    (gemma.GEMMA3,),
    image=262144,
).family()
