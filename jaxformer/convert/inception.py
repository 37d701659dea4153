"""InceptionV3 as torchvision and timm name its tensors, and as FID's network is kept for torch.

A hub directory of timm's `inception_v3`, or a `config.json` that somebody writes beside
safetensors of a file of others: `{"architecture": "inception_v3", "num_classes": 1000}`, and
for the network of the original FID (`pt_inception-2015-12-05`) `"num_classes": 1008` and
`"fid": true`.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.convert import parts
from jaxformer.convert.config import number
from jaxformer.convert.engine import Entry, Family
from jaxformer.errors import InputError
from jaxformer.models.inception import BLOCKS, SMALLEST, STEM, InceptionV3, Step


def _model(config: dict[str, Any], names: set[str], dtype: Any) -> InceptionV3:
    channels, *_ = (config.get("pretrained_cfg") or {}).get("input_size") or (3,)
    if channels != 3:
        raise InputError(f"config.json: input_size has {channels} channels; 3 are known")
    trained = config.get("pretrained_cfg") or {}
    told = {"num_classes": config.get("num_classes", trained.get("num_classes"))}
    return InceptionV3(
        number(told, "num_classes", 1000) if "fc.weight" in names else 0,
        fid=bool(config.get("fid", False)),
        divide=number(config, "width_divisor", 1),
        dtype=dtype,
    )


def _config(model: Any) -> dict[str, Any] | None:
    if not isinstance(model, InceptionV3) or model.epsilon != 1e-3:
        return None
    told: dict[str, Any] = {
        "architecture": "inception_v3",
        "num_classes": model.num_classes,
        "num_features": 2048 // model.divide,
        "pretrained_cfg": {"input_size": [3, 299, 299], "num_classes": model.num_classes},
    }
    told |= {"fid": True} if model.fid else {}
    return told | ({} if model.divide == 1 else {"width_divisor": model.divide})


def convolutions() -> Iterator[str]:
    """Every convolution, by torch's name."""
    yield from (step.name for step in STEM if step is not None)
    for block, branches in BLOCKS.items():
        for branch in branches:
            for steps in branch:
                for step in (steps,) if isinstance(steps, Step) else steps:
                    yield f"{block}.{step.name}"


def _entries(model: InceptionV3) -> list[Entry]:
    found = parts.linear("fc", "fc") if model.num_classes else []
    for theirs in convolutions():
        ours = theirs.replace(".", "/")
        found.append(Entry(f"{ours}/kernel", f"{theirs}.conv.weight", "O I P Q -> P Q I O"))
        found += parts.norm(ours, f"{theirs}.bn")
        for name, tensor in (("mean", "running_mean"), ("variance", "running_var")):
            found.append(Entry(f"{ours}/{name}", f"{theirs}.bn.{tensor}", "D -> D"))
    return found


def _inputs(model: InceptionV3) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((1, SMALLEST, SMALLEST, 3), jnp.float32)]


INCEPTION = Family(
    name="inception_v3",
    model=_model,
    config=_config,
    entries=_entries,
    inputs=_inputs,
    ignore=(r"^AuxLogits\.", r"\.num_batches_tracked$"),
)
