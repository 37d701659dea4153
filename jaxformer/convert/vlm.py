"""LLaVA and PaliGemma of transformers: a tower of images, a projector, a language model.

The tower and the language model are of families of their own, whose tables are read here
with a prefix before every name. Files as saved since transformers 5 are read too; those that
are written have the hub's names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.convert import clip, engine, gemma, language, llama, parts, siglip, towers
from jaxformer.convert.config import activation_of, name_of, part
from jaxformer.convert.engine import Entry, Family
from jaxformer.convert.files import Stored
from jaxformer.errors import InputError
from jaxformer.layers.block import Stack
from jaxformer.layers.connect import Project
from jaxformer.models.vit import Encoder
from jaxformer.models.vlm import VLM, Early

TEXT, VISION, PROJECTOR = "language_model.", "vision_tower.", "multi_modal_projector."
_CLIP, _SIGLIP = clip.CLIP_VISION, siglip.SIGLIP_VISION


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family: the tower and the language models that it may have, the first by default."""

    name: str
    architecture: str
    tower: Family
    texts: tuple[Family, ...]
    image: int  # the id of the token, where the config does not say it.

    def text(self, config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
        """The family of the language model, and its config."""
        told = part(config, "text_config")
        kind = told.get("model_type", self.texts[0].name)
        found = next((family for family in self.texts if family.name == kind), None)
        if found is None:
            known = ", ".join(family.name for family in self.texts)
            raise InputError(
                f"config.json: text_config has model_type={kind!r}; known with {self.name} are "
                f"{known}"
            )
        # How the prefix is seen is no matter of the text alone.
        told.pop("use_bidirectional_attention", None)
        return found, told

    def model(self, config: dict[str, Any], names: set[str], dtype: Any) -> VLM:
        """The model of a config."""
        told = part(config, "vision_config")
        kind = told.get("model_type", self.tower.name)
        if kind != self.tower.name:
            raise InputError(
                f"config.json: vision_config has model_type={kind!r}; {self.name} is known "
                f"with {self.tower.name}"
            )
        tower: Any = self.tower.model(told, _within(VISION, names), dtype)
        family, told = self.text(config)
        text: Any = family.model(told, _within(TEXT, names), dtype)
        image = config.get("image_token_index", config.get("image_token_id", self.image))
        if isinstance(image, bool) or not isinstance(image, int) or image < 0:
            raise InputError(f"config.json: image_token_index={image!r} must be a token's id")
        vision, connector, skip = self.join(config, tower, text.table.width, dtype)
        return self.module(vision, connector, text, image, skip)

    @property
    def module(self) -> type[VLM]:
        """What the parts are put together by."""
        return VLM

    def knows(self, connector: Any) -> bool:
        """Whether a connector is one of the family's."""
        return type(connector) is Project

    def join(self, config: dict[str, Any], tower: Encoder, width: int, dtype: Any):
        """The tower as it is used, the projector, and how many tokens are left out."""
        raise NotImplementedError

    def told(self, model: VLM) -> dict[str, Any] | None:
        """What the config says of them, or None where it cannot."""
        raise NotImplementedError

    def tower_of(self, model: VLM) -> Any:
        """The tower as it is kept."""
        raise NotImplementedError

    def config(self, model: Any) -> dict[str, Any] | None:
        """The config of a model."""
        if type(model) is not self.module or not self.knows(model.connector):
            return None
        told, tower = self.told(model), self.tower_of(model)
        vision = None if tower is None else self.tower.config(tower)
        text = next(filter(None, (told_by(f, model.language) for f in self.texts)), None)
        if told is None or vision is None or text is None:
            return None
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "image_token_index": model.image,
            "tie_word_embeddings": text["tie_word_embeddings"],
            "vision_config": vision,
            "text_config": text,
            **told,
        }

    def entries(self, model: Any) -> list[Entry]:
        """The table."""
        texts = nested("language/", TEXT, language.entries(model.language))
        return [*self.images(model), *self.projector(model.connector), *texts]

    def images(self, model: VLM) -> list[Entry]:
        """The table of the tower."""
        return nested("vision/", VISION, self.tower.entries(self.tower_of(model)))

    def projector(self, connector: Any) -> list[Entry]:
        """The table of the projector."""
        raise NotImplementedError

    def inputs(self, model: Any) -> list[jax.ShapeDtypeStruct]:
        """A text of one token, and an image."""
        (image,) = towers.inputs(self.tower_of(model))
        images = jax.ShapeDtypeStruct((1, *image.shape), image.dtype)
        return [jax.ShapeDtypeStruct((1, 1), jnp.int32), images]

    def unpack(self, config: Mapping[str, Any], tensors: dict[str, Stored]):
        """Without a head that is tied."""
        family, told = self.text(config)
        inner = {n.removeprefix(TEXT): x for n, x in tensors.items() if n.startswith(TEXT)}
        kept = {f"{TEXT}{name}": x for name, x in family.unpack(told, inner).items()}
        return {n: x for n, x in tensors.items() if not n.startswith(TEXT)} | kept

    def family(self) -> Family:
        """What the engine takes."""
        return Family(
            name=self.name,
            model=self.model,
            config=self.config,
            entries=self.entries,
            inputs=self.inputs,
            rename=(
                (r"^model\.language_model\.", f"{TEXT}model."),
                (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
                (r"^lm_head\.", f"{TEXT}lm_head."),
                (r"^vision_tower\.(?!vision_model\.)", f"{VISION}vision_model."),
            ),
            ignore=(*towers.IGNORE, *language.IGNORE),
            unpack=self.unpack,
        )


class Llava(Kind):
    """An early layer of CLIP without its class token, and an MLP."""

    def join(self, config, tower, width, dtype):
        layer, depth = config.get("vision_feature_layer", -2), tower.stack.depth
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise InputError(
                f"config.json: vision_feature_layer={layer!r} is not supported; it must be one "
                "number"
            )
        run = layer if layer >= 0 else depth + 1 + layer
        if not 1 <= run <= depth:
            raise InputError(
                f"config.json: vision_feature_layer={layer} is none of {depth} layers"
            )
        select = config.get("vision_feature_select_strategy", "default")
        if select not in ("default", "full"):
            raise InputError(
                f"config.json: vision_feature_select_strategy={select!r} must be default or "
                "full"
            )
        connector = Project(
            width,
            width,
            activation_of(config, "projector_hidden_act", "gelu"),
            bool(config.get("multimodal_projector_bias", True)),
            dtype,
        )
        block: Any = tower.stack.block
        other = block.clone(attention=block.attention.clone(), mlp=block.mlp.clone())
        rest: tuple[Any, ...] = (Stack(other, depth - run),) if run < depth else ()
        early = dataclasses.replace(tower, stack=Stack(block, run), norm=None)
        rest = (*rest, tower.norm)
        return Early(early, rest), connector, int(select == "default")

    def tower_of(self, model) -> Any:
        early: Any = model.vision
        if type(early) is not Early or type(early.encoder.stack) is not Stack:
            return None
        depth = early.encoder.stack.depth + sum(x.depth for x in early.rest[:-1])
        stack = Stack(early.encoder.stack.block, depth)
        return dataclasses.replace(early.encoder, stack=stack, norm=early.rest[-1])

    def told(self, model):
        tower, connector = self.tower_of(model), model.connector
        if tower is None or connector.hidden != connector.width or model.skip not in (0, 1):
            return None
        run = model.vision.encoder.stack.depth
        return {
            "vision_feature_layer": run - tower.stack.depth - 1,
            "vision_feature_select_strategy": "default" if model.skip else "full",
            "projector_hidden_act": name_of(connector.activation),
            "multimodal_projector_bias": connector.use_bias,
        }

    def images(self, model):
        tower, early = self.tower_of(model), model.vision
        run, depth = early.encoder.stack.depth, tower.stack.depth
        found = []
        for entry in self.tower.entries(tower):
            top, _, below = entry.ours.partition("/")
            places = [(f"encoder/{entry.ours}", None)]
            if top == "stack":
                places = [(f"encoder/{entry.ours}", range(run))]
                places += [(f"rest_0/{below}", range(run, depth))] if run < depth else []
            elif top == "norm":
                places = [(f"rest_{len(early.rest) - 1}/{below}", None)]
            found += [
                dataclasses.replace(entry, ours=ours, layers=layers) for ours, layers in places
            ]
        return nested("vision/", VISION, found)

    def projector(self, connector):
        bias = connector.use_bias
        return [
            *parts.linear("connector/up", f"{PROJECTOR}linear_1", bias),
            *parts.linear("connector/down", f"{PROJECTOR}linear_2", bias),
        ]


class _PaliGemma(Kind):
    """All of SigLIP's tokens after its last norm, and a linear layer."""

    def join(self, config, tower, width, dtype):
        return tower, Project(width, dtype=dtype), 0

    def tower_of(self, model):
        return model.vision

    def told(self, model):
        linear = model.connector.hidden is None and model.connector.use_bias
        if model.skip or not linear:
            return None
        return {"projection_dim": model.connector.width, "hidden_size": model.connector.width}

    def projector(self, connector):
        return parts.linear("connector/out", f"{PROJECTOR}linear")


def _within(prefix: str, names: set[str]) -> set[str]:
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def nested(ours: str, theirs: str, entries) -> list[Entry]:
    """Entries with more before their paths and names."""
    return [
        dataclasses.replace(e, ours=f"{ours}{e.ours}", theirs=f"{theirs}{e.theirs}")
        for e in entries
    ]


def told_by(family: Family, model: Any) -> dict[str, Any] | None:
    """The config of a model, where it makes that again."""
    told = family.config(model)
    return told if told is not None and engine.is_told_by(told, family, model) else None


LLAMAS = (llama.LLAMA, llama.MISTRAL, llama.QWEN2, llama.QWEN3)
LLAVA = Llava("llava", "LlavaForConditionalGeneration", _CLIP, LLAMAS, image=32000).family()
PALIGEMMA = _PaliGemma(
    "paligemma", "PaliGemmaForConditionalGeneration", _SIGLIP, (gemma.GEMMA,), image=256000
).family()
