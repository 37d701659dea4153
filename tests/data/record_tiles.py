"""Writes tiles.json: how transformers' LLaVA-NeXT lays the tiles of images together.

python -m tests.data.record_tiles, where the extra `parity` is installed.
"""

import json
import pathlib

FILE = pathlib.Path(__file__).with_name("tiles.json")
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES = [[300, 800], [801, 300], [500, 480], [1500, 200], [200, 1501], [640, 427], [37, 53]]
TILE, SIDE = 336, 4


def record() -> list:
    import torch
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    found = []
    for size in SIZES:
        high, wide = select_best_resolution(size, PINPOINTS)
        y, x = high // TILE, wide // TILE
        numbers = torch.arange(y * x * SIDE**2).view(1, y, x, SIDE, SIDE)
        frame = numbers.permute(0, 1, 3, 2, 4).flatten(1, 2).flatten(2, 3)
        own = unpad_image(frame, size)[0]
        found.append(
            {"best": [high, wide], "shape": list(own.shape), "first": own[:2].tolist()}
        )
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(record()) + "\n")
