"""Writes rotary.json: what transformers makes of each law. Run where it is installed.

python -m tests.convert.record_rotary
"""

import json
import pathlib
from typing import Any

FILE = pathlib.Path(__file__).with_name("rotary.json")
LENGTH, HEAD_DIM, THETA = 256, 16, 1e4
LAWS = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "yarn", "factor": 8.0},
    {"rope_type": "yarn", "factor": 8.0, "truncate": False, "beta_fast": 9, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.2},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
)


def config_of(law: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that has this law, for a length of `LENGTH` tokens."""
    long = {"original_max_position_embeddings": LENGTH}
    law = law | (long if law["rope_type"] in ("yarn", "llama3") else {})
    longer = LENGTH * 8 if law["rope_type"] == "llama3" else LENGTH
    return {
        "head_dim": HEAD_DIM,
        "max_position_embeddings": longer,
        "rope_parameters": law | {"rope_theta": THETA},
    }


def record() -> list[dict]:
    """For each law and 1, 2 and 8 times the length: angles of the last position."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    found = []
    for law in LAWS:
        for times in (1, 2, 8):
            module = LlamaRotaryEmbedding(LlamaConfig(**config_of(law)))
            positions = torch.arange(times * LENGTH)[None]
            cos, _ = module(torch.zeros(1), positions)
            assert cos.shape[1] == times * LENGTH
            # The frequencies are what that call has left.
            case = {"law": law, "times": times, "factor": float(module.attention_scaling)}
            case["frequencies"] = module.inv_freq.double().tolist()
            case["cosines"] = [round(x, 6) for x in cos[0, -1, : HEAD_DIM // 2].tolist()]
            found.append(case)
    return found


if __name__ == "__main__":
    FILE.write_text("[\n" + ",\n".join(map(json.dumps, record())) + "\n]\n")
