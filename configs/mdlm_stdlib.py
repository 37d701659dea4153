"""Masked diffusion on Python's standard library: decoder_stdlib.py, seeing both ways.

Data: the running Python's library without its tests, as in decoder_stdlib.py.
Model: the same decoder without the causal mask, trained by masked diffusion (MDLM, arXiv
2406.07524; MD4, 2406.04329). Bits per byte are a bound, drawn by count, and above the truth.
Expected: at most 2.65 bits a byte of the held-out files after 14.5 CPU minutes, where the
decoder has 1.75 and counts of single tokens 2.72: so few steps are too few. Command:
    python -m train configs/mdlm_stdlib.py
    python -m evaluate configs/mdlm_stdlib.py --checkpoint runs/mdlm_stdlib
"""

import dataclasses

from configs.decoder_stdlib import experiment as decoder
from evaluate.infill import Infill
from evaluate.likelihood import Likelihood
from jaxformer.experiment import Experiment
from jaxformer.objectives.unmask import Unmask


def experiment() -> Experiment:
    """The decoder's experiment, by another objective; the mask is one more token."""
    causal = decoder()
    mask = causal.model.vocab
    held_out, infill = causal.tasks["held_out"], causal.tasks["infill"]
    assert isinstance(held_out, Likelihood) and isinstance(infill, Infill)
    return dataclasses.replace(
        causal,
        model=causal.model.clone(vocab=mask + 1, causal=False),
        objective=Unmask(mask, chunk=None, samples=4),
        tasks={
            "held_out": dataclasses.replace(held_out, objective=Unmask(mask, samples=2)),
            "infill": dataclasses.replace(infill, mask_id=mask),
        },
    )
