"""Qwen2-VL and Qwen2.5-VL of transformers: images and videos as large as they are.

Their `pixel_values` are our patches with channels first, row after row of the batch without
padding, and their grids ours. Files have the hub's names, or those of transformers 5's
modules; configs may have the text's fields beside `vision_config` or in `text_config`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxformer.convert import language, llama, parts
from jaxformer.convert.config import activation_of, name_of, number, part
from jaxformer.convert.engine import Entry, Family
from jaxformer.convert.files import Stored
from jaxformer.convert.stacks import arrange, layers_of
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Block, Chain, Mlp
from jaxformer.layers.connect import Project
from jaxformer.layers.native import Fold, NativeEmbed, NearBlock
from jaxformer.layers.norm import LayerNorm, RMSNorm
from jaxformer.models.native import NativeEncoder, NativeVLM

VISION, _TABLE = "visual.", "model.embed_tokens.weight"
_OUTER = {"vision_config", "text_config", "model_type", "architectures"}
_IMAGE, _VIDEO = 151655, 151656


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family: its names, what its configs leave out, and what its encoder has."""

    name: str
    architecture: str
    language: llama.Kind
    sections: tuple[int, int, int]
    text: Mapping[str, Any]  # what the text's config leaves out.
    vision: Mapping[str, Any]
    width: str  # what the config calls the encoder's width,
    out: str  # and that of what it gives.
    interleaved: bool = False
    module: ClassVar[type[NativeVLM]] = NativeVLM
    encoders: ClassVar[type[NativeEncoder]] = NativeEncoder

    def told(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The text's config, with all that it leaves out."""
        found = config.get("text_config")
        if not found:  # As the hub has it.
            found = {name: x for name, x in config.items() if name not in _OUTER}
        if not isinstance(found, dict):
            raise InputError(f"config.json: text_config must be an object, not {found!r}")
        found = {**self.text, **found}
        tied = bool(config.get("tie_word_embeddings", False))
        found["tie_word_embeddings"] = tied or bool(found.get("tie_word_embeddings", False))
        law = found.pop("rope_scaling", None) or found.get("rope_parameters") or {}
        own = {"mrope_section": list(self.sections), **law}
        if self.interleaved:
            own["mrope_interleaved"] = True
        return found | {"rope_parameters": own}

    def model(self, config: dict[str, Any], names: set[str], dtype: Any) -> NativeVLM:
        """The model of a config."""
        text: Any = self.language.model(self.told(config), names, dtype)
        seen = dict(self.vision) | part(config, "vision_config")
        ids = []
        for name, default in (("image_token_id", _IMAGE), ("video_token_id", _VIDEO)):
            ids.append(config.get(name, default))
            if isinstance(ids[-1], bool) or not isinstance(ids[-1], int) or ids[-1] < 0:
                raise InputError(f"config.json: {name}={ids[-1]!r} must be a token's id")
        if number(seen, self.out, text.table.width) != text.table.width:
            raise InputError(
                f"config.json: {self.out}={seen[self.out]} of the images must be the text's "
                f"hidden_size={text.table.width}"
            )
        vision = self.encoder(seen, dtype)
        connector = self.connector(vision.embed, text.table.width, dtype)
        rate = self.rate(seen)
        return self.module(vision, connector, text, ids[0], video=ids[1], rate=rate)

    def rate(self, seen: dict[str, Any]) -> int | None:
        """Places a second of a video."""
        return None

    def encoder(self, seen: dict[str, Any], dtype: Any) -> NativeEncoder:
        """The encoder of images."""
        embed = self.embed(seen, dtype)
        blocks = [self.block(seen, i, dtype) for i in range(number(seen, "depth", 32))]
        return NativeEncoder(embed, arrange(blocks))

    def embed(self, seen: dict[str, Any], dtype: Any, **options) -> NativeEmbed:
        """Its patches."""
        D, N = number(seen, self.width, 1280), number(seen, "num_heads", 16)
        if D % (4 * N):
            raise InputError(
                f"config.json: {self.width}={D} must be num_heads={N} times a multiple of 4"
            )
        law = seen.get("rope_parameters") or {}
        return NativeEmbed(
            number(seen, "patch_size", 14),
            D,
            D // N,
            number(seen, "spatial_merge_size", 2),
            number(seen, "temporal_patch_size", 2),
            theta=number(law, "rope_theta", 1e4),
            channels=number(seen, "in_channels", 3),
            dtype=dtype,
            **options,
        )

    def attention(self, seen: dict[str, Any], dtype: Any) -> Attention:
        """That of an encoder's block."""
        D, N = number(seen, self.width, 1280), number(seen, "num_heads", 16)
        return Attention(N, D // N, use_bias=True, dtype=dtype)

    def block(self, seen: dict[str, Any], layer: int, dtype: Any) -> Block:
        """A block of the encoder."""
        raise NotImplementedError

    def connector(self, embed: NativeEmbed, width: int, dtype: Any) -> Chain:
        """A norm, and an MLP of what is merged."""
        unit = embed.side**2
        norm = self.norm()
        return Chain((norm, Fold(unit), Project(width, unit * embed.width, dtype=dtype)))

    def norm(self) -> Any:
        """The norm of the encoder, whose epsilon no config says."""
        return LayerNorm(1e-6)

    def seen(self, model: NativeVLM, blocks: list[Any]) -> dict[str, Any]:
        """What the config says of the encoder's blocks."""
        raise NotImplementedError

    def config(self, model: Any) -> dict[str, Any] | None:
        """The config of a model."""
        if type(model) is not self.module or type(model.vision) is not self.encoders:
            return None
        text = self.language.config(model.language)
        blocks = [layer.block for layer in layers_of(model.vision.stack)]
        if text is None or "rope_parameters" not in text:
            return None
        embed = model.vision.embed
        vision = {
            "model_type": f"{self.name}_vision",
            "depth": len(blocks),
            "num_heads": blocks[0].attention.num_heads,
            "hidden_act": name_of(blocks[0].mlp.activation),
            self.width: embed.width,
            self.out: model.language.table.width,
            "patch_size": embed.patch,
            "spatial_merge_size": embed.side,
            "temporal_patch_size": embed.frames,
            "in_channels": embed.channels,
            "rope_parameters": {"rope_type": "axial", "rope_theta": embed.theta},
            **self.seen(model, blocks),
        }
        del text["architectures"]
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "image_token_id": model.image,
            "video_token_id": model.video,
            "tie_word_embeddings": text["tie_word_embeddings"],
            "vision_config": vision,
            "text_config": text | {"model_type": f"{self.name}_text"},
        }

    def entries(self, model: Any) -> list[Entry]:
        """The table."""
        encoder, found = model.vision, []
        embed = encoder.embed
        sizes = {"f": embed.frames, "p": embed.patch, "q": embed.patch}
        patch = f"{VISION}patch_embed.proj"
        layout = "D C f p q -> (f p q C) D"
        found.append(Entry("embed/patch/kernel", f"{patch}.weight", layout, sizes))
        if embed.use_bias:
            found.append(Entry("embed/patch/bias", f"{patch}.bias", "D -> D"))
        for path, theirs, block, entry in language.places(encoder.stack, f"{VISION}blocks"):
            bias = block.norm is LayerNorm
            found += parts.fused_attention(
                f"{path}/attention",
                f"{theirs}.attn.qkv",
                f"{theirs}.attn.proj",
                block.attention.num_heads,
                **entry,
            )
            for i, name in enumerate(("attention_norm", "mlp_norm")):
                found += parts.norm(f"{path}/{name}", f"{theirs}.norm{i + 1}", bias, **entry)
            for name, tensor in self.mlps().items():
                found += parts.linear(f"{path}/mlp/{name}", f"{theirs}.mlp.{tensor}", **entry)
        texts = language.entries(model.language)
        return [
            *(dataclasses.replace(e, ours=f"vision/{e.ours}") for e in found),
            *self.merger(model),
            *(dataclasses.replace(e, ours=f"language/{e.ours}") for e in texts),
        ]

    def mlps(self) -> dict[str, str]:
        """What the linear layers of the encoder's MLP are called."""
        return {"up": "fc1", "down": "fc2"}

    def merger(self, model: NativeVLM) -> list[Entry]:
        """The table of the connector."""
        theirs = f"{VISION}merger"
        return [
            *parts.norm("connector/parts_0", f"{theirs}.ln_q", type(self.norm()) is LayerNorm),
            *parts.linear("connector/parts_2/up", f"{theirs}.mlp.0"),
            *parts.linear("connector/parts_2/down", f"{theirs}.mlp.2"),
        ]

    def inputs(self, model: Any) -> list[jax.ShapeDtypeStruct]:
        """A text of one token, and patches of one merged token."""
        embed = model.vision.embed
        shapes = ((1, 1), (1, embed.side**2, embed.size), (1, 1, 3))
        types = (jnp.int32, jnp.float32, jnp.int32)
        return [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, types, strict=True)]

    def unpack(self, config: Mapping[str, Any], tensors: dict[str, Stored]):
        """Without a head that is tied."""
        return language.unpack_head(_TABLE, False)(self.told(config), tensors)

    def spell(self, model: Any, name: str) -> str:
        """The hub's name of a tensor."""
        return name

    def family(self) -> Family:
        """What the engine takes."""
        return Family(
            name=self.name,
            model=self.model,
            config=self.config,
            entries=self.entries,
            inputs=self.inputs,
            rename=((r"^model\.language_model\.", "model."), (r"^model\.visual\.", VISION)),
            ignore=language.IGNORE,
            unpack=self.unpack,
            spell=self.spell,
        )


class _Qwen2(Kind):
    """Plain blocks, whose MLP is so many times as wide."""

    def block(self, seen, layer, dtype):
        width = number(seen, "embed_dim", 1280) * number(seen, "mlp_ratio", 4)
        activation = activation_of(seen, "hidden_act", "quick_gelu")
        mlp = Mlp(width, activation, use_bias=True, dtype=dtype)
        return Block(self.attention(seen, dtype), mlp, LayerNorm, 1e-6)

    def seen(self, model, blocks):
        return {"mlp_ratio": blocks[0].mlp.width // model.vision.embed.width}


class _Qwen25(Kind):
    """Blocks of a gated MLP and RMS norms, most of which see a window."""

    def embed(self, seen, dtype, **options):
        embed = super().embed(seen, dtype, **options)
        size = number(seen, "window_size", 112)
        return dataclasses.replace(embed, window=max(1, size // embed.side // embed.patch))

    def rate(self, seen):
        return number(seen, "tokens_per_second", 4)

    def block(self, seen, layer, dtype):
        full = seen.get("fullatt_block_indexes", ())
        if not isinstance(full, list | tuple):
            raise InputError(f"config.json: fullatt_block_indexes={full!r} must be a list")
        activation = activation_of(seen, "hidden_act", "silu")
        width = number(seen, "intermediate_size", 3420)
        mlp = Mlp(width, activation, True, True, dtype=dtype)
        attention = self.attention(seen, dtype)
        return NearBlock(attention, mlp, RMSNorm, 1e-6, local=layer not in full)

    def norm(self):
        return RMSNorm(1e-6)

    def seen(self, model, blocks):
        embed = model.vision.embed
        return {
            "intermediate_size": blocks[0].mlp.width,
            "tokens_per_second": model.rate,
            "window_size": (embed.window or 0) * embed.side * embed.patch,
            "fullatt_block_indexes": [
                i for i, block in enumerate(blocks) if not getattr(block, "local", True)
            ],
        }

    def mlps(self):
        return {name: f"{name}_proj" for name in ("gate", "up", "down")}


_QWEN2: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_window_layers": 80,
}
_SECTIONS = (16, 24, 24)
QWEN2_VL = _Qwen2(
    "qwen2_vl",
    "Qwen2VLForConditionalGeneration",
    llama.QWEN2_KIND,
    _SECTIONS,
    _QWEN2,
    {"embed_dim": 1280},
    "embed_dim",
    "hidden_size",
).family()
QWEN25_VL = _Qwen25(
    "qwen2_5_vl",
    "Qwen2_5_VLForConditionalGeneration",
    llama.QWEN2_KIND,
    _SECTIONS,
    _QWEN2,
    {"hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]},
    "hidden_size",
    "out_hidden_size",
).family()
