"""Writes resize.json: what PyTorch makes of a small grid. Run where torch is installed.

python -m tests.ops.record_resize
"""

import itertools
import json
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_name("resize.json")
GRIDS = ((7, 5), (1, 6))
SHAPES = ((3, 4), (10, 13), (7, 2))


def record() -> list[dict]:
    import torch

    rng = np.random.default_rng(0)
    out = []
    for grid, shape in itertools.product(GRIDS, SHAPES):
        x = rng.standard_normal(grid).round(3).astype(np.float32)
        for method, antialias in itertools.product(("bicubic", "bilinear"), (False, True)):
            y = torch.nn.functional.interpolate(
                torch.tensor(x)[None, None],
                size=shape,
                mode=method,
                align_corners=False,
                antialias=antialias,
            )
            case = {"method": method, "antialias": antialias, "x": x.tolist()}
            out.append(case | {"y": [[round(v, 7) for v in row] for row in y[0, 0].tolist()]})
    for case in out:
        case["x"] = [[round(v, 3) for v in row] for row in case["x"]]
    return out


if __name__ == "__main__":
    FILE.write_text("[\n" + ",\n".join(map(json.dumps, record())) + "\n]\n")
