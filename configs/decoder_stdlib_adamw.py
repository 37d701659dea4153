"""configs/decoder_stdlib.py with AdamW in the place of Muon.

Data: the running Python's library without its tests, as there. Optimizer: AdamW
(arXiv 1711.05101).
Expected: docs/decoder.md has the curves of both. Command:
    python -m train configs/decoder_stdlib_adamw.py
"""

import dataclasses

from configs.decoder_stdlib import experiment as stdlib
from jaxformer.experiment import Experiment
from jaxformer.optim import AdamW, Cosine


def experiment() -> Experiment:
    """About five minutes on two CPU cores."""
    optimizer = AdamW(rate=Cosine(peak=4e-3, warmup=0.1), b2=0.95)
    return dataclasses.replace(stdlib(), optimizer=optimizer)
