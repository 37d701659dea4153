"""Qwen3-VL of transformers: early layers of the encoder reach early layers of the text."""

import dataclasses
import itertools
import math
from typing import Any

from jaxformer.convert import llama, parts
from jaxformer.convert.config import activation_of, number
from jaxformer.convert.engine import Entry
from jaxformer.convert.qwen_vl import VISION, Kind
from jaxformer.convert.stacks import arrange, layers_of
from jaxformer.errors import InputError
from jaxformer.layers.block import Block, Chain, Mlp, Stack
from jaxformer.layers.connect import Project
from jaxformer.layers.deep import DeepBlock
from jaxformer.layers.native import CornerPosition, Fold
from jaxformer.layers.norm import LayerNorm
from jaxformer.models.deep import DeepEncoder, DeepVLM


class _Qwen3(Kind):
    """Learned positions beside rotary ones, and mergers of early layers."""

    module, encoders = DeepVLM, DeepEncoder

    def model(self, config, names, dtype):
        made: Any = super().model(config, names, dtype)
        width, count = made.language.table.width, len(made.vision.taps)
        blocks = [layer.block for layer in layers_of(made.language.stack)]
        if count > len(blocks):
            raise InputError(
                f"config.json: deepstack_visual_indexes has {count} layers and the text "
                f"{len(blocks)}; it must have as many or more"
            )
        deep = [
            DeepBlock(
                block.attention.clone(),
                block.mlp.clone(),
                block.norm,
                block.epsilon,
                index=i if i < count else None,
            )
            for i, block in enumerate(blocks)
        ]
        text = made.language.clone(stack=arrange(deep))
        mergers = tuple(self._merger(made.vision.embed, width, dtype) for _ in range(count))
        return dataclasses.replace(made, language=text, mergers=mergers)

    def _merger(self, embed, width, dtype) -> Chain:
        """Of an early layer: the norm is of what is merged."""
        unit = embed.side**2
        mlp = Project(width, unit * embed.width, dtype=dtype)
        return Chain((Fold(unit), self.norm(), mlp))

    def encoder(self, seen, dtype):
        depth = number(seen, "depth", 27)
        taps = seen.get("deepstack_visual_indexes", (8, 16, 24))
        cuts = [-1, *taps, depth - 1]
        if any(b <= a for a, b in itertools.pairwise(cuts[:-1])) or cuts[-2] >= depth:
            raise InputError(
                f"config.json: deepstack_visual_indexes={taps!r} must be of {depth} layers, "
                "each after the one before"
            )
        ends = [c for i, c in enumerate(cuts) if i == 0 or c > cuts[i - 1]]
        stacks = tuple(
            Stack(self.block(seen, a, dtype), b - a) for a, b in itertools.pairwise(ends)
        )
        return DeepEncoder(self.embed(seen, dtype), Chain(stacks), tuple(taps))

    def embed(self, seen, dtype, **options):
        count = number(seen, "num_position_embeddings", 2304)
        side = math.isqrt(count)
        if side**2 != count:
            raise InputError(
                f"config.json: num_position_embeddings={count} must be the square of a number"
            )
        position = CornerPosition(number(seen, "hidden_size", 1152), (side, side))
        return super().embed(seen, dtype, position=position, use_bias=True)

    def block(self, seen, layer, dtype):
        activation = activation_of(seen, "hidden_act", "gelu_pytorch_tanh")
        width = number(seen, "intermediate_size", 4304)
        mlp = Mlp(width, activation, use_bias=True, dtype=dtype)
        return Block(self.attention(seen, dtype), mlp, LayerNorm, 1e-6)

    def seen(self, model, blocks):
        position: Any = model.vision.embed.position
        return {
            "intermediate_size": blocks[0].mlp.width,
            "num_position_embeddings": math.prod(position.shape),
            "deepstack_visual_indexes": list(model.vision.taps),
        }

    def mlps(self):
        return {"up": "linear_fc1", "down": "linear_fc2"}

    def merger(self, model):
        table = Entry(
            "vision/embed/position/embedding", f"{VISION}pos_embed.weight", "T D -> T D"
        )
        found = [table, *self._merged("connector", f"{VISION}merger", 0)]
        for i in range(len(model.mergers)):
            found += self._merged(f"mergers_{i}", f"{VISION}deepstack_merger_list.{i}", 1)
        return found

    def _merged(self, ours: str, theirs: str, norm: int) -> list[Entry]:
        return [
            *parts.norm(f"{ours}/parts_{norm}", f"{theirs}.norm"),
            *parts.linear(f"{ours}/parts_2/up", f"{theirs}.linear_fc1"),
            *parts.linear(f"{ours}/parts_2/down", f"{theirs}.linear_fc2"),
        ]

    def spell(self, model, name):
        if name.startswith(VISION):
            return f"model.{name}"
        head, _, rest = name.partition("model.")
        return name if head else f"model.language_model.{rest}"


_TEXT: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rope_theta": 5e5,
}
QWEN3_VL = _Qwen3(
    "qwen3_vl",
    "Qwen3VLForConditionalGeneration",
    llama.QWEN3_KIND,
    (24, 20, 20),
    _TEXT,
    {"depth": 27, "hidden_size": 1152, "patch_size": 16},
    "hidden_size",
    "out_hidden_size",
    interleaved=True,
).family()
