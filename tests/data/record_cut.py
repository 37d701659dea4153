"""Writes cut.npz: small images as the processors of LLaVA-NeXT and Llama 3.2 Vision tile them.

python -m tests.data.record_cut, where the extra `parity` is installed.
"""

import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_name("cut.npz")
TILE, MOST = 8, 4
AMONG = [(8, 16), (16, 8), (16, 16), (24, 8), (8, 24)]
SIZES = [
    (7, 19),
    (20, 9),
    (12, 11),
    (30, 10),
    (6, 13),
    (40, 33),
    (5, 5),
    (9, 23),
    (31, 8),
]


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*SIZES[number], 3)).astype(np.uint8)


def record() -> dict[str, np.ndarray]:
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    plain = {"do_rescale": False, "do_normalize": False}
    square = {"height": TILE, "width": TILE}
    among = [list(size) for size in AMONG]
    nxt = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size=square, image_grid_pinpoints=among, **plain
    )
    llama = MllamaImageProcessorPil(size=square, max_image_tiles=MOST, **plain)
    found = {}
    for number in range(len(SIZES)):
        made = nxt(image(number), return_tensors="np")["pixel_values"][0]
        found[f"spread {number}"] = made.transpose(0, 2, 3, 1).astype(np.uint8)
        made = llama(image(number), return_tensors="np")
        tiles = made["pixel_values"][0, 0, : made["num_tiles"][0][0]]
        found[f"fitted {number}"] = tiles.transpose(0, 2, 3, 1).astype(np.uint8)
        found[f"number {number}"] = made["aspect_ratio_ids"][0, 0]
    return found


if __name__ == "__main__":
    np.savez_compressed(FILE, **record())
