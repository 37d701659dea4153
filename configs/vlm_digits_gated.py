"""configs/vlm_digits.py with gated cross-attention in the place of spliced features.

Data: the same scenes and questions. Model: the same tower and decoder, with a gated block
before each layer of the decoder (Flamingo, arXiv 2204.14198); the text has one token for
the image, and looks at all 32 patches.
Expected: after 600 of its steps (5.9 CPU minutes) 90.0 % of the largest digits, but 44.6 % of
the answers to questions that read; it has not been run to its end. Command:
    python -m train configs/vlm_digits_gated.py steps=600
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
    """About eight minutes on two CPU cores."""
    made = spliced()
    parts = made.model
    model = Flamingo(parts.vision, Project(WIDTH, hidden=128), gated(parts.language), IMAGE)
    counted = functools.partial(flops, own=parts.language, keys=GRID[0] * GRID[1])
    return dataclasses.replace(made, model=model, flops=counted, **scenes(places=1))
