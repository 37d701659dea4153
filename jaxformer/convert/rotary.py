"""What a config says of rotary positions, in transformers 4's words and in 5's.

4 has `rope_theta` and `rope_scaling`; 5 has both in `rope_parameters`, and writes that.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxformer.convert.config import number
from jaxformer.errors import InputError
from jaxformer.ops.rotary_scaling import (
    DynamicNTK,
    Linear,
    Llama3,
    MRotary,
    Rotary,
    Scaling,
    YaRN,
)

KINDS = "default, linear, dynamic, yarn and llama3"


def rotary_of(config: Mapping[str, Any], theta: float = 1e4) -> Rotary:
    """The rotary positions of a config; `theta` is what its class takes where it says none.

    Raises:
      InputError: a law that is not known; a number that is missing or none.
    """
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, dict) or any(isinstance(x, dict) for x in found.values()):
        raise InputError(
            f"config.json: rope_parameters={found!r} must be one law for all layers of this "
            "family"
        )
    return read(found, config, number(config, "rope_theta", theta))


def read(found: Mapping[str, Any], config: Mapping[str, Any], theta: float) -> Rotary:
    """One law: `found` is its dict, `theta` what is taken where that says none."""
    if number(found, "partial_rotary_factor", 1.0) != 1 or (
        number(config, "partial_rotary_factor", 1.0) != 1
    ):
        raise InputError(
            "config.json: partial_rotary_factor must be 1; heads that are turned in part are "
            "not known"
        )
    theta, law = number(found, "rope_theta", theta), _law(found, config)
    sections = found.get("mrope_section")
    if sections is None:
        return Rotary(theta, law)
    if not isinstance(sections, list) or len(sections) != 3:
        raise InputError(f"config.json: mrope_section={sections!r} must be three numbers")
    frames, rows, columns = (number({"mrope_section": n}, "mrope_section", 1) for n in sections)
    return MRotary(
        theta, law, (frames, rows, columns), bool(found.get("mrope_interleaved", False))
    )


def _law(found: Mapping[str, Any], config: Mapping[str, Any]) -> Scaling | None:
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind in ("default", "mrope"):  # The latter says that there are sections.
        return None
    if kind == "linear":
        return Linear(_own(found, "factor"))
    if kind == "dynamic":
        return DynamicNTK(_own(found, "factor"), _trained(config))
    trained = found.get("original_max_position_embeddings")
    length = _trained(config if trained is None else {"max_position_embeddings": trained})
    if kind == "llama3":
        low, high = _own(found, "low_freq_factor"), _own(found, "high_freq_factor")
        return Llama3(_own(found, "factor"), length, low, high)
    if kind == "yarn":
        return _yarn(found, config, length)
    raise InputError(f"config.json: rope_type={kind!r} is not known; known are {KINDS}")


def _yarn(found: Mapping[str, Any], config: Mapping[str, Any], length: int) -> YaRN:
    factor = number(found, "factor", number(config, "max_position_embeddings", length) / length)
    attention = found.get("attention_factor")
    if attention is not None:
        attention = _own(found, "attention_factor")
    elif found.get("mscale") and found.get("mscale_all_dim"):  # DeepSeek's.
        up, down = _own(found, "mscale"), _own(found, "mscale_all_dim")
        growth = 0.1 * math.log(factor) if factor > 1 else 0.0
        attention = (growth * up + 1) / (growth * down + 1)
    fast, slow = number(found, "beta_fast", 32.0), number(found, "beta_slow", 1.0)
    return YaRN(factor, length, fast, slow, attention, bool(found.get("truncate", True)))


def _own(found: Mapping[str, Any], name: str) -> float:
    if found.get(name) is None:
        raise InputError(
            f"config.json: rope_type={found.get('rope_type', found.get('type'))!r} needs {name}"
        )
    return number(found, name, 1.0)


def _trained(config: Mapping[str, Any]) -> int:
    if config.get("max_position_embeddings") is None:
        raise InputError(
            "config.json: rotary positions that are scaled need max_position_embeddings"
        )
    return number(config, "max_position_embeddings", 1)


def length_of(config: Mapping[str, Any], rotary: Rotary | None) -> int | None:
    """How many tokens a model is for, or None where its config says nothing.

    It is `max_position_embeddings`. Where a law stretches that, it is as much longer, as the
    configs of models that were stretched after training have it: for linear and dynamic
    laws, whose factor is of `max_position_embeddings`; and for YaRN, `factor` times the
    length trained on if that is more (Qwen 2.5 has a config that leaves the one as it was).
    """
    if config.get("max_position_embeddings") is None:
        return None
    length = number(config, "max_position_embeddings", 1)
    law = None if rotary is None else rotary.scaling
    if isinstance(law, Linear | DynamicNTK):
        return round(length * law.factor)
    if isinstance(law, YaRN):
        return max(length, round(law.length * law.factor))
    return length


def told_of(rotary: Rotary) -> dict[str, Any]:
    """A law as `rope_parameters` has it."""
    law: Scaling | None = rotary.scaling
    found: dict[str, Any] = {"rope_theta": rotary.theta}
    if isinstance(rotary, MRotary):
        found["mrope_section"] = list(rotary.sections)
        if rotary.interleaved:
            found["mrope_interleaved"] = True
    match law:
        case Linear():
            return found | {"rope_type": "linear", "factor": law.factor}
        case DynamicNTK():
            return found | {"rope_type": "dynamic", "factor": law.factor}
        case Llama3():
            return found | {
                "rope_type": "llama3",
                "factor": law.factor,
                "original_max_position_embeddings": law.length,
                "low_freq_factor": law.low,
                "high_freq_factor": law.high,
            }
        case YaRN():
            told = {
                "rope_type": "yarn",
                "factor": law.factor,
                "original_max_position_embeddings": law.length,
                "beta_fast": law.fast,
                "beta_slow": law.slow,
                "truncate": law.whole,
            }
            return found | told | _some("attention_factor", law.attention)
    return found | {"rope_type": "default"}


def told_length(length: int | None, rotary: Rotary | None) -> dict[str, Any]:
    """The `max_position_embeddings` that `length_of` would make this of."""
    law = None if rotary is None else rotary.scaling
    if isinstance(law, DynamicNTK):
        length = law.length
    elif isinstance(law, Linear) and length is not None:
        length = round(length / law.factor)
    return _some("max_position_embeddings", length)


def _some(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else {name: value}
