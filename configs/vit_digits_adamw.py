"""configs/vit_digits.py with AdamW in the place of Muon, and the steps that it needs."""

import dataclasses

from configs.vit_digits import experiment as digits
from jaxformer.experiment import Experiment
from jaxformer.optim import AdamW, Cosine


def experiment() -> Experiment:
    """About two minutes on two CPU cores."""
    optimizer = AdamW(rate=Cosine(peak=4e-3, warmup=0.1), b2=0.95)
    return dataclasses.replace(digits(), optimizer=optimizer, steps=1200)
