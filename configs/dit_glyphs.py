"""A DiT on 64 x 64 pixels that draws a Unicode character in a font, as both are asked for.

Data: 9,357 pairs of 650 characters and the sixteen text fonts of matplotlib; 1,043 pairs are
held out, of characters and fonts that were seen apart. No download.
Model: JiT's transformer (arXiv 2511.13720), which says the picture itself, on patches of 8;
learned by the error of the velocity, with Muon.
Expected: `pairs/loss`, the same of pairs held out, falls; not run to its end by us. The rows
of `pictures` are fonts. Command:
    python -m train configs/dit_glyphs.py
"""

from evaluate.draw import Draw
from evaluate.grid import Grid
from jaxformer.data.glyphs import StyledGlyphs
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.experiment import Experiment, Keep
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.dit import flops
from jaxformer.models.pair_dit import PairDiT
from jaxformer.objectives.condition import Classes
from jaxformer.objectives.flow import Flow
from jaxformer.objectives.paths import Reading
from jaxformer.objectives.times import LogitNormal
from jaxformer.optim import Cosine, Muon, NewtonSchulz
from jaxformer.samplers.guidance import Guidance
from jaxformer.samplers.ode import Ode

CHARACTERS, FONTS = 650, 16
SHOWN = (18, 32, 48, 70, 82, 129, 173, 474, 552, 548)  # 3 A Q g s and five beyond ASCII.


def experiment() -> Experiment:
    """Hours on two CPU cores, minutes on an accelerator; every number can be overridden."""
    normalize = Normalize(mean=0.5, std=0.5)  # To [-1, 1].
    draw = Draw((64, 64, 1), normalize, Ode(25), Guidance(2.0))
    asked = tuple(tuple(CHARACTERS * font + c for c in SHOWN) for font in range(FONTS))
    return Experiment(
        model=PairDiT(
            width=192,
            depth=6,
            num_heads=6,
            patch=8,
            channels=1,
            num_classes=CHARACTERS * FONTS,
            firsts=CHARACTERS,
            norm=RMSNorm,
            gated=True,
            rotary=True,
            qk_norm=True,
            bottleneck=32,
            remat="dots",  # Which a CPU is faster with.
        ),
        objective=Flow(Classes(CHARACTERS * FONTS), Reading("data"), law=LogitNormal(0.8, 0.8)),
        optimizer=Muon(
            rate=Cosine(peak=0.01, warmup=0.05),
            newton_schulz=NewtonSchulz(dtype="float32"),  # Which a CPU is faster in.
        ),
        data=Pipeline(StyledGlyphs("train"), (normalize,)),
        evals={"pairs": Pipeline(StyledGlyphs("pairs"), (normalize,))},
        pictures={"glyphs": Grid(draw, given=asked)},
        steps=20_000,
        batch_size=128,
        eval_every=2000,
        keep=Keep(every=1000),
        ema=0.999,
        flops=flops,
    )
