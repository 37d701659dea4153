"""configs/vlm_digits.py with a Q-Former in the place of merged patches.

Data: the same scenes and questions. Model: the same tower and decoder; between them 8
learned queries that look at all 32 patches in every second of 4 layers (BLIP-2, arXiv
2301.12597), so that the text has as many tokens of the image.
Expected: after its 1,500 steps (14.5 CPU minutes, 1.14 times the operations of vlm_digits)
89.6 % of the sums, but 47.1 % of the answers to questions that read: which digits there are
is learned before their order. Command:
    python -m train configs/vlm_digits_qformer.py
    python -m evaluate configs/vlm_digits_qformer.py --checkpoint runs/vlm_digits_qformer
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from configs.vlm_digits import GRID, WIDTH, scenes
from configs.vlm_digits import experiment as spliced
from jaxformer.experiment import Experiment
from jaxformer.layers.connect import Project
from jaxformer.models import qformer, vlm
from jaxformer.models.qformer import QFormer, Sizes
from jaxformer.models.vlm import VLM

QUERIES, PATCHES = 8, GRID[0] * GRID[1]
SIZES = Sizes(WIDTH, depth=4, mlp_dim=256, num_heads=4, unroll=4)


def flops(model: VLM, text: Sequence[int], images: Sequence[int], *rest: Any) -> int:
    """Those of `vlm.flops`, and of the queries of each image."""
    own = images[0] * qformer.flops(SIZES, QUERIES, PATCHES, WIDTH)
    return vlm.flops(model, text, images) + own


def experiment() -> Experiment:
    """About fourteen minutes on one CPU core."""
    made = spliced()
    former = QFormer(QUERIES, WIDTH, SIZES.stack(), Project(WIDTH))
    model = dataclasses.replace(made.model, connector=former)
    return dataclasses.replace(made, model=model, flops=flops, **scenes(places=QUERIES))
