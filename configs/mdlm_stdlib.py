"""Masked diffusion on Python's standard library: decoder_stdlib.py, seeing both ways.

Data: the running Python's library without its tests, as in decoder_stdlib.py.
Model: the same decoder, which for half of the run learns the next token, and then without the
causal mask what is masked (MDLM, arXiv 2406.07524; from a decoder as Dream, 2508.15487). Bits
per byte are a bound, drawn by count, and above the truth.
Expected: at most 2.34 bits a byte of 128 held-out rows after 14 CPU minutes, where
the decoder has 1.81 and counts of single tokens 2.72. Command:
    python -m train configs/mdlm_stdlib.py
    python -m evaluate configs/mdlm_stdlib.py --checkpoint runs/mdlm_stdlib
"""

import dataclasses

from configs.decoder_stdlib import experiment as decoder
from evaluate.infill import Infill
from evaluate.likelihood import Likelihood
from jaxformer.experiment import Experiment
from jaxformer.objectives.stages import Stages
from jaxformer.objectives.unmask import Unmask


def experiment() -> Experiment:
    """The decoder's experiment, by another objective; the mask is one more token."""
    causal = decoder()
    mask = causal.model.vocab
    held_out, infill = causal.tasks["held_out"], causal.tasks["infill"]
    assert isinstance(held_out, Likelihood) and isinstance(infill, Infill)
    unmask = Unmask(mask, shift=True, chunk=None, samples=2)
    objective = Stages((dataclasses.replace(unmask, block=1), unmask), until=(300,))
    return dataclasses.replace(
        causal,
        model=causal.model.clone(vocab=mask + 1, causal=False),
        objective=objective,
        eval_every=150,  # A bound takes several draws.
        keep=dataclasses.replace(causal.keep, every=150),
        tasks={
            "held_out": dataclasses.replace(held_out, objective=unmask),
            "infill": dataclasses.replace(infill, mask_id=mask, shift=True),
        },
    )
