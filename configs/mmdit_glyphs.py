"""An MMDiT that draws characters by their Unicode names, letter by letter.

Data: 38,362 drawings of 5,633 characters in matplotlib's fonts, 24 x 24 pixels; held out
are the STIX fonts. No download.
Model: two streams in one attention (arXiv 2403.03206) with the positions of Qwen-Image
(2508.02324), learned by flow matching with times of a logit-normal law.
Expected: `fonts/loss`, the squared error of the velocity, falls; how well names can be drawn
has not been measured. Command:
    python -m train configs/mmdit_glyphs.py
"""

from jaxformer.data.glyphs import NamedGlyphs
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.text import VOCAB, Spell
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.mmdit import MMDiT, flops
from jaxformer.objectives.flow_text import TextFlow
from jaxformer.objectives.times import LogitNormal
from jaxformer.optim import Cosine, Muon, NewtonSchulz

LENGTH = 74  # tokens of the longest name, and its end.


def experiment() -> Experiment:
    """Small enough for a CPU and patience; every number of it can be overridden."""
    normalize, spell = Normalize(mean=0.5, std=0.5), Spell(LENGTH)

    def split(name: str) -> Pipeline:
        return Pipeline(NamedGlyphs(name), (normalize, spell))

    return Experiment(
        model=MMDiT(
            depth=4,
            num_heads=3,
            head_dim=32,
            patch=4,
            channels=1,
            pooled_width=None,
            vocab=VOCAB,
            table=None,
            axes=(8, 12, 12),
            qk_norm=True,
            remat="dots",
        ),
        objective=TextFlow(law=LogitNormal()),
        optimizer=Muon(
            rate=Cosine(peak=0.01, warmup=0.1),
            newton_schulz=NewtonSchulz(dtype="float32"),
        ),
        data=split("train"),
        evals={"fonts": split("fonts")},
        steps=5000,
        batch_size=128,
        eval_every=1000,
        keep=Keep(every=500),
        ema=0.999,
        flops=cost,
    )


def cost(model: MMDiT, image: tuple[int, int, int], _, text: tuple[int, ...]) -> int:
    """Operations of one drawing and its name forward."""
    return flops(model, image, text[0])
