"""Writes native.json: the sizes to which transformers resizes images for Qwen-VL.

python -m tests.data.record_native, where the extra `parity` is installed.
"""

import json
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_name("native.json")
LAWS = ({}, {"factor": 32, "least": 65536, "most": 2**24})  # Qwen2-VL's, Qwen3-VL's.


def sizes() -> list[list[int]]:
    draw = np.random.default_rng(0)
    found = np.exp(draw.uniform(np.log(8), np.log(6000), (60, 2))).astype(int)
    return [[int(y), int(x)] for y, x in found if max(y, x) <= 200 * min(y, x)]


def record() -> list:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    found = []
    for law in LAWS:
        names = {"factor": "factor", "least": "min_pixels", "most": "max_pixels"}
        law = {names[name]: x for name, x in law.items()}
        found.append([smart_resize(y, x, **law) for y, x in sizes()])
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(record()) + "\n")
