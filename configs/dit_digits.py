"""DiT on scanned digits: drawn by class out of noise, read by a classifier of real ones.

Data: scikit-learn's 1,797 digits of 8 x 8 pixels, 360 of them held out; no download.
Model: a diffusion transformer (arXiv 2212.09748) on pixels, learned by flow matching
(2209.03003) with times of a logit-normal law (2403.03206) and Muon.
Expected: 98.8 % of 1,000 draws are read as what was asked for, and their Frechet distance is
0.032, where held-out digits have 0.046 (one seed, see docs/dit.md). The judge is the classifier
of vit_digits.py, which is trained first; tasks={} does without. Commands:
    python -m train configs/vit_digits.py
    python -m train configs/dit_digits.py
    python -m evaluate configs/dit_digits.py --checkpoint runs/dit_digits
"""

from evaluate.draw import Draw
from evaluate.drawn import Drawn
from evaluate.encoder import Run
from evaluate.grid import Grid
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Digits
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.dit import DiT, flops
from jaxformer.objectives.condition import Classes
from jaxformer.objectives.flow import Flow
from jaxformer.objectives.times import LogitNormal
from jaxformer.optim import Cosine, Muon, NewtonSchulz
from jaxformer.samplers.guidance import Guidance
from jaxformer.samplers.ode import Ode


def experiment() -> Experiment:
    """Six minutes of a CPU; every number of it can be overridden."""
    normalize = Normalize(mean=0.5, std=0.5)  # To [-1, 1].
    train, test = (Pipeline(Digits(split), (normalize,)) for split in ("train", "test"))
    plain = Draw((8, 8, 1), normalize, Ode(25))
    guided = Draw((8, 8, 1), normalize, Ode(25), Guidance(1.5))
    judge = Run("configs/vit_digits.py", "runs/vit_digits")
    return Experiment(
        model=DiT(
            width=64,
            depth=5,
            num_heads=4,
            patch=2,
            channels=1,
            num_classes=10,
            remat="dots",  # Which a CPU is faster with.
        ),
        objective=Flow(Classes(10), law=LogitNormal()),
        optimizer=Muon(
            rate=Cosine(peak=0.015, warmup=0.05),
            newton_schulz=NewtonSchulz(dtype="float32"),  # Which a CPU is faster in.
        ),
        data=train,
        evals={"test": test},
        tasks={
            "plain": Drawn(plain, judge, train, test),
            "guided": Drawn(guided, judge, train, test),
        },
        pictures={"digits": Grid(guided)},
        steps=1400,
        batch_size=128,
        ema=0.998,
        keep=Keep(every=700, metric="-test/loss"),
        eval_every=1400,
        flops=cost,
    )


def cost(model: DiT, image: tuple[int, int, int], *_) -> int:
    """Operations of one picture forward; time and label cost next to nothing."""
    return flops(model, image)
