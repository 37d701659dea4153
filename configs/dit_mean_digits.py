"""dit_digits.py by mean flow: digits in four steps, beside fifty of the same model.

Data: scikit-learn's digits, as there.
Model: the same transformer, told a span of time too, learned by MeanFlow (arXiv 2505.13447).
Expected: of 1,000 draws in four steps 86 % are read as what was asked for, in fifty 88 % (one
seed); the judge is trained first, see dit_digits.py. Commands:
    python -m train configs/dit_mean_digits.py
    python -m evaluate configs/dit_mean_digits.py --checkpoint runs/dit_mean_digits
"""

import dataclasses

from configs.dit_digits import experiment as digits
from evaluate.drawn import Drawn
from evaluate.grid import Grid
from jaxformer.experiment import Experiment
from jaxformer.models.span_dit import SpanDiT
from jaxformer.objectives.condition import Classes
from jaxformer.objectives.mean_flow import MeanFlow
from jaxformer.samplers.jumps import Jumps
from jaxformer.samplers.ode import Ode


def experiment() -> Experiment:
    """Minutes on two CPU cores: a step costs about twice one of dit_digits.py."""
    flow = digits()
    plain: Drawn = flow.tasks["plain"]  # pyright: ignore[reportAssignmentType]

    def by(sampler) -> Drawn:
        return dataclasses.replace(plain, draw=dataclasses.replace(plain.draw, sampler=sampler))

    names = ("width", "depth", "num_heads", "patch", "channels", "num_classes", "remat")
    return dataclasses.replace(
        flow,
        model=SpanDiT(**{name: getattr(flow.model, name) for name in names}),
        objective=MeanFlow(Classes(10)),
        tasks={"one": by(Jumps(1)), "four": by(Jumps(4)), "fifty": by(Ode(50, "euler"))},
        pictures={"digits": Grid(by(Jumps(4)).draw)},
    )
