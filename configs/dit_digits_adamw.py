"""configs/dit_digits.py with AdamW in the place of Muon, and as many steps.

Data: scikit-learn's digits, as there. Optimizer: AdamW (arXiv 1711.05101).
Expected: 92 to 95 % are read as what was asked for, where Muon has 99 %; the judge is trained
first, see dit_digits.py. Command:
    python -m train configs/dit_digits_adamw.py
"""

import dataclasses

from configs.dit_digits import experiment as digits
from jaxformer.experiment import Experiment
from jaxformer.optim import AdamW, Cosine


def experiment() -> Experiment:
    """A step costs a little less than one of dit_digits.py."""
    optimizer = AdamW(rate=Cosine(peak=2e-3, warmup=0.05), decay=0.0)
    return dataclasses.replace(digits(), optimizer=optimizer)
