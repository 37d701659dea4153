"""LLaVA 1.5 7B, second stage: connector and decoder learn to follow instructions.

Paper: Liu et al. 2023, arXiv 2310.03744: 665,000 conversations once, 128 a step, a rate of
2e-5, warm-up 3 %, a cosine to 0, AdamW without decay, the tower frozen. It goes on from the
run of the first stage, llava_7b.py.
Expected: not run here.
Data: `data/llava/instruct.jsonl` in LLaVA's layout, and what the first stage reads. Command:
    python -m train configs/llava_7b_instruct.py --mesh data=2,fsdp=64
"""

import dataclasses
import math

from configs.llava_7b import dialogues
from configs.llava_7b import experiment as align
from jaxformer.data.templates import Vicuna
from jaxformer.experiment import Experiment
from jaxformer.optim import AdamW, Cosine, Parts
from jaxformer.start import Run

SAMPLES, BATCH = 665_298, 128


def experiment() -> Experiment:
    """For a pod; the mesh is given with the command."""
    recipe = AdamW(rate=Cosine(peak=2e-5, warmup=0.03), decay=0.0)
    return dataclasses.replace(
        align(),
        optimizer=Parts(recipe, ("connector", "language")),
        data=dialogues("instruct", 2048, Vicuna()),
        start=(Run("runs/llava_7b"),),
        steps=math.ceil(SAMPLES / BATCH),
        batch_size=BATCH,
    )
