"""MMDiT as diffusers has it: `SD3Transformer2DModel` and `QwenImageTransformer2DModel`.

Of Qwen-Image, which is given patches and not images, channels are slowest in a patch, and
pairs that turn together are neighbours in a head: ours are its two halves.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxformer.convert import parts
from jaxformer.convert.config import number
from jaxformer.convert.dit import modulation
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.layers.block import Chain
from jaxformer.layers.joint import JointBlock
from jaxformer.models.mmdit import CroppedPosition, JointAngles, MMDiT, TextDenoiser

BLOCK = "transformer_blocks.{}"


def _sd3_model(config: dict[str, Any], names: set[str], dtype: Any) -> nn.Module:
    heads = number(config, "num_attention_heads", 18)
    head = number(config, "attention_head_dim", 64)
    text = number(config, "caption_projection_dim", 1152)
    depth, own = number(config, "num_layers", 18), config.get("dual_attention_layers") or ()
    patch, channels = number(config, "patch_size", 2), number(config, "in_channels", 16)
    sample, norm = number(config, "sample_size", 128), config.get("qk_norm")
    if text != heads * head:
        raise InputError(
            f"config.json: caption_projection_dim={text} must be the width {heads * head}"
        )
    if number(config, "out_channels", 16) != channels:
        raise InputError("config.json: out_channels must be in_channels; SD3 has no other")
    if norm not in (None, "rms_norm"):
        raise InputError(f"config.json: qk_norm={norm!r} must be null or 'rms_norm'")
    if list(own) != list(range(len(own))) or len(own) >= depth:
        raise InputError("config.json: dual_attention_layers must be the first ones: 0, 1, ...")
    return MMDiT(
        depth,
        heads,
        head,
        patch,
        channels,
        number(config, "joint_attention_dim", 4096),
        number(config, "pooled_projection_dim", 2048),
        number(config, "pos_embed_max_size", 96),
        sample // patch,
        qk_norm=norm is not None,
        own_layers=len(own),
        dtype=dtype,
    ).parts()


def _kinds(model: Any) -> list[tuple[str, JointBlock, range]]:
    """Each stack of a model's: its path, its block, and which layers it is."""
    if not isinstance(model, TextDenoiser):
        return []
    stack: Any = model.stack
    chained = isinstance(stack, Chain)
    found, first = [], 0
    for i, part in enumerate(stack.parts if chained else [stack]):
        block, depth = getattr(part, "block", None), getattr(part, "depth", 0)
        if not isinstance(block, JointBlock):
            return []
        layers = range(first, first + depth)
        found.append((f"stack/parts_{i}/block" if chained else "stack/block", block, layers))
        first = layers.stop
    return found


def _sd3_config(model: Any) -> dict[str, Any] | None:
    kinds = _kinds(model)
    if not kinds or not isinstance(model.embed.position, CroppedPosition):
        return None
    block, position = kinds[0][1], model.embed.position
    shape = model.text.text_width, model.condition.pooled_width
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": block.head_dim,
        "caption_projection_dim": model.embed.width,
        "dual_attention_layers": [i for _, b, layers in kinds if b.own for i in layers],
        "in_channels": model.embed.channels,
        "joint_attention_dim": shape[0],
        "num_attention_heads": block.num_heads,
        "num_layers": kinds[-1][2].stop,
        "out_channels": model.channels,
        "patch_size": model.embed.patch,
        "pooled_projection_dim": shape[1],
        "pos_embed_max_size": position.side,
        "qk_norm": None if block.qk_norm is None else "rms_norm",
        "sample_size": position.base * model.embed.patch,
    }


def _stream(ours: str, theirs: str, names: Mapping[str, str], block: JointBlock, **entry):
    """One stream's attention; with `p` in its sizes pairs are neighbours in theirs."""
    sizes: dict[str, int] = {"N": block.num_heads, **entry.pop("sizes", {})}
    head = "H p" if "p" in sizes else "H"
    mine = "(p H)" if "p" in sizes else "H"
    found = []
    for name in ("query", "key", "value"):
        kernel, bias = f"{ours}/{name}/kernel", f"{ours}/{name}/bias"
        tensor = f"{theirs}.{names[name]}"
        turned = head if name != "value" else "H"
        own = mine if name != "value" else "H"
        some = sizes if name != "value" else {"N": block.num_heads}
        layout = f"(N {turned}) D -> D N {own}"
        found.append(Entry(kernel, f"{tensor}.weight", layout, some, **entry))
        layout = f"(N {turned}) -> N {own}"
        found.append(Entry(bias, f"{tensor}.bias", layout, some, **entry))
        if name != "value" and block.qk_norm is not None:
            some = {k: v for k, v in sizes.items() if k == "p"}
            tensor = f"{theirs}.{names[f'{name}_norm']}.weight"
            layout = f"({head}) -> {mine}" if some else "H -> H"
            found.append(Entry(f"{ours}/{name}_norm/scale", tensor, layout, some, **entry))
    if "out" in names:
        tensor, some = f"{theirs}.{names['out']}", {"N": block.num_heads}
        layout = "D (N H) -> N H D"
        found.append(Entry(f"{ours}/out/kernel", f"{tensor}.weight", layout, some, **entry))
        found.append(Entry(f"{ours}/out/bias", f"{tensor}.bias", "D -> D", **entry))
    return found


IMAGE = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    "query_norm": "norm_q",
    "key_norm": "norm_k",
}
TEXT = {
    "query": "add_q_proj",
    "key": "add_k_proj",
    "value": "add_v_proj",
    "out": "to_add_out",
    "query_norm": "norm_added_q",
    "key_norm": "norm_added_k",
}


def _mlp(ours: str, theirs: str, **entry) -> list[Entry]:
    return [
        *parts.linear(f"{ours}/up", f"{theirs}.net.0.proj", **entry),
        *parts.linear(f"{ours}/down", f"{theirs}.net.2", **entry),
    ]


def _blocks(model: Any, names: Mapping[str, str], **sizes) -> list[Entry]:
    """The blocks; `names` are what theirs call the modulations and MLPs of a stream."""
    found = []
    for path, block, layers in _kinds(model):
        more: dict[str, Any] = {"layers": list(layers)}
        last = block.text_mlp is None
        image = modulation(
            f"{path}/image_modulation/linear",
            f"{BLOCK}.{names['image']}",
            6 if block.own is None else 9,
            **more,
        )
        text = modulation(
            f"{path}/text_modulation/linear",
            f"{BLOCK}.{names['text']}",
            2 if last else 6,
            **more,
        )
        theirs = f"{BLOCK}.attn"
        told = {k: v for k, v in TEXT.items() if not (last and k == "out")}
        own = {**more, "sizes": sizes}
        found += [*image, *text]
        found += _stream(f"{path}/image_attention", theirs, IMAGE, block, **own)
        found += _stream(f"{path}/text_attention", theirs, told, block, **own)
        found += _mlp(f"{path}/mlp", f"{BLOCK}.{names['mlp']}", **more)
        if not last:
            found += _mlp(f"{path}/text_mlp", f"{BLOCK}.{names['text_mlp']}", **more)
        if block.own is not None:
            found += _stream(f"{path}/own", f"{BLOCK}.attn2", IMAGE, block, **more)
    return found


def _around(time: str) -> list[Entry]:
    return [
        *parts.linear("condition/time/up", f"{time}.timestep_embedder.linear_1"),
        *parts.linear("condition/time/down", f"{time}.timestep_embedder.linear_2"),
        *modulation("norm/modulation/linear", "norm_out.linear", 2),
    ]


def _sd3_entries(model: Any) -> list[Entry]:
    names = {
        "image": "norm1.linear",
        "text": "norm1_context.linear",
        "mlp": "ff",
        "text_mlp": "ff_context",
    }
    return [
        *_around("time_text_embed"),
        *parts.linear("condition/text_up", "time_text_embed.text_embedder.linear_1"),
        *parts.linear("condition/text_down", "time_text_embed.text_embedder.linear_2"),
        *parts.patches("embed/patch", "pos_embed.proj", model.embed.patch),
        Entry("embed/position/bias", "pos_embed.pos_embed", "() T D -> T D"),
        *parts.linear("text/linear", "context_embedder"),
        *parts.linear("head", "proj_out"),
        *_blocks(model, names),
    ]


def _qwen_model(config: dict[str, Any], names: set[str], dtype: Any) -> nn.Module:
    patch = number(config, "patch_size", 2)
    channels, out = number(config, "in_channels", 64), number(config, "out_channels", 16)
    told = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
    more = [name for name in told if config.get(name)]
    if more:
        raise InputError(f"config.json: {more[0]} must be false, as in the first Qwen-Image")
    if channels != out * patch**2:
        raise InputError(
            f"config.json: in_channels={channels} must be out_channels={out} times "
            f"patch_size={patch} squared"
        )
    axes = config.get("axes_dims_rope", (16, 56, 56))
    head = number(config, "attention_head_dim", 128)
    if sum(axes) != head or any(n % 2 for n in axes):
        raise InputError(f"config.json: axes_dims_rope={axes} must be even and sum to {head}")
    return MMDiT(
        number(config, "num_layers", 60),
        number(config, "num_attention_heads", 24),
        head,
        patch,
        out,
        number(config, "joint_attention_dim", 3584),
        None,
        None,
        axes=tuple(axes),
        qk_norm=True,
        dtype=dtype,
    ).parts()


def _qwen_config(model: Any) -> dict[str, Any] | None:
    kinds = _kinds(model)
    if not kinds or not isinstance(model.angles, JointAngles):
        return None
    block = kinds[0][1]
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "attention_head_dim": block.head_dim,
        "axes_dims_rope": list(model.angles.sizes),
        "guidance_embeds": False,
        "in_channels": model.embed.channels * model.embed.patch**2,
        "joint_attention_dim": model.text.text_width,
        "num_attention_heads": block.num_heads,
        "num_layers": kinds[-1][2].stop,
        "out_channels": model.channels,
        "patch_size": model.embed.patch,
    }


def _qwen_entries(model: Any) -> list[Entry]:
    names = {"image": "img_mod.1", "text": "txt_mod.1", "mlp": "img_mlp", "text_mlp": "txt_mlp"}
    sizes = {"p": model.embed.patch, "q": model.embed.patch}
    return [
        *_around("time_text_embed"),
        Entry("embed/patch/kernel", "img_in.weight", "D (C p q) -> (p q C) D", sizes),
        Entry("embed/patch/bias", "img_in.bias", "D -> D"),
        Entry("text/norm/scale", "txt_norm.weight", "D -> D"),
        *parts.linear("text/linear", "txt_in"),
        Entry("head/kernel", "proj_out.weight", "(C p q) D -> D (p q C)", sizes),
        Entry("head/bias", "proj_out.bias", "(C p q) -> (p q C)", sizes),
        *_blocks(model, names, p=2),
    ]


def inputs(model: Any) -> list[jax.ShapeDtypeStruct]:
    """Shapes that an MMDiT can be initialised with."""
    side = 2 * model.embed.patch
    found = [(1, side, side, model.embed.channels), (1,), (1, 2, model.text.text_width)]
    if model.condition.pooled_width:
        found.append((1, model.condition.pooled_width))
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in found]


SD3 = Family(
    name="SD3Transformer2DModel",
    model=_sd3_model,
    config=_sd3_config,
    entries=_sd3_entries,
    inputs=inputs,
)
QWEN = Family(
    name="QwenImageTransformer2DModel",
    model=_qwen_model,
    config=_qwen_config,
    entries=_qwen_entries,
    inputs=inputs,
)
