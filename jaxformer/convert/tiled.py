"""LLaVA-NeXT of transformers: LLaVA with tiles, `LlavaNextForConditionalGeneration`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.convert import clip, towers
from jaxformer.convert.engine import Entry
from jaxformer.convert.vlm import LLAMAS, Llava
from jaxformer.models.tiled import TiledVLM

# Where the config has none; they are of images on the host, and kept as they come.
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


class _LlavaNext(Llava):
    """A vector for a new line, and resolutions for images."""

    @property
    def module(self):
        return TiledVLM

    def model(self, config: dict[str, Any], names: set[str], dtype: Any):
        made: Any = super().model(config, names, dtype)
        found = config.get("image_grid_pinpoints") or _PINPOINTS
        return dataclasses.replace(made, pinpoints=tuple((int(y), int(x)) for y, x in found))

    def config(self, model: Any):
        found = super().config(model)
        if found is None:
            return None
        return found | {"image_grid_pinpoints": [list(size) for size in model.pinpoints]}

    def entries(self, model: Any) -> list[Entry]:
        return [
            *super().entries(model),
            Entry("newline/embedding", "image_newline", "D -> () D"),
        ]

    def inputs(self, model: Any) -> list[jax.ShapeDtypeStruct]:
        (image,) = towers.inputs(self.tower_of(model))
        shapes = (((1, 1), jnp.int32), ((1, *image.shape), image.dtype), ((1, 1), jnp.int32))
        return [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def family(self):
        made = super().family()
        rename = (*made.rename, (r"^model\.image_newline$", "image_newline"))
        return dataclasses.replace(made, rename=rename)


LLAVA_NEXT = _LlavaNext(
    "llava_next",
    "LlavaNextForConditionalGeneration",
    clip.CLIP_VISION,
    LLAMAS,
    image=32000,
).family()
