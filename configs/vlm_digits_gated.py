"""configs/vlm_digits.py with gated cross-attention in the place of spliced features.

Data: the same scenes and questions. Model: the same tower and decoder, with a gated block
before each layer of the decoder (Flamingo, arXiv 2204.14198); the text has one token for
the image, and looks at all 32 patches.
Expected: after its 1,500 steps (13.4 CPU minutes, 1.41 times the operations of vlm_digits)
91.9 % of the sums, but 66.7 % of the answers to questions that read. Command:
    python -m train configs/vlm_digits_gated.py
    python -m evaluate configs/vlm_digits_gated.py --checkpoint runs/vlm_digits_gated
"""

import dataclasses
import functools

from configs.vlm_digits import GRID, WIDTH, scenes
from configs.vlm_digits import experiment as spliced
from jaxformer.data.scenes import IMAGE
from jaxformer.experiment import Experiment
from jaxformer.layers.connect import Project
from jaxformer.models.flamingo import Flamingo, flops, gated


def experiment() -> Experiment:
    """About fourteen minutes on one CPU core."""
    made = spliced()
    parts = made.model
    model = Flamingo(parts.vision, Project(WIDTH, hidden=128), gated(parts.language), IMAGE)
    counted = functools.partial(flops, own=parts.language, keys=GRID[0] * GRID[1])
    return dataclasses.replace(made, model=model, flops=counted, **scenes(places=1))
