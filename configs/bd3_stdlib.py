"""Block diffusion on Python's standard library: mdlm_stdlib.py, 16 tokens at a time.

Data: the running Python's library without its tests, as in decoder_stdlib.py.
Model: the same decoder; each block of 16 tokens is guessed from itself, masked in part, and
from the clean blocks before it (BD3-LM, arXiv 2503.09573). Rows are twice as long for it. It
begins as the decoder, which is a block of one token.
Expected: at most 2.28 bits a byte of 128 held-out rows after 16 CPU minutes, where
the decoder has 1.81 and counts of single tokens 2.72. Command:
    python -m train configs/bd3_stdlib.py
    python -m evaluate configs/bd3_stdlib.py --checkpoint runs/bd3_stdlib
"""

import dataclasses

from configs.mdlm_stdlib import experiment as mdlm
from jaxformer.experiment import Experiment, override
from jaxformer.models.mdlm import Streams


def experiment() -> Experiment:
    """Masked diffusion's experiment, by blocks."""
    found = override(
        mdlm(),
        "objective.stages.1.block=16",
        "tasks.held_out.objective.block=16",
        "tasks.infill.block=16",
        "tasks.infill.before=1.0",
        "steps=450",  # Two streams cost twice as much.
    )
    return dataclasses.replace(found, flops=Streams(16))  # Of the last stage.
