"""Python source, drawn, read back as text: 4 letters of text for each token of the image.

Data: pages of 2 rows of 32 letters of the running Python's library (`data.pages`), drawn in
24 x 192 pixels; the pages of the test are of files held out. No download.
Model: a ViT, neighbours merged along a row, and a decoder, all from scratch with Muon. How
many letters one token of the image must hold is the question of DeepSeek-OCR (arXiv
2510.18234); a token of text is a letter here.
Expected: after 5.6 CPU minutes 99.9 % of the letters right after true ones, and 0.16 % of the
letters wrong (CER) where the text is written without them. Command:
    python -m train configs/vlm_page.py
    python -m evaluate configs/vlm_page.py --checkpoint runs/vlm_page
"""

from evaluate.reading import Reading
from jaxformer.data.corpus import Stdlib
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.pages import CELL, IMAGE, VOCAB, Pages, Read
from jaxformer.experiment import Experiment, Keep
from jaxformer.layers.block import Chain
from jaxformer.layers.connect import Merge, Project
from jaxformer.models.decoder import Decoder
from jaxformer.models.vit import ViT
from jaxformer.models.vlm import VLM, flops
from jaxformer.objectives.next_token import NextToken
from jaxformer.optim import Cosine, Muon, NewtonSchulz

ROWS, COLUMNS, PATCH, WIDTH = 2, 32, 12, 96
GRID = (ROWS * CELL[0] // PATCH, COLUMNS * CELL[1] // PATCH)  # Of 2 letters each.


def page(letters: int) -> Experiment:
    """With so many letters of text for each token of the image."""
    places = ROWS * COLUMNS // letters
    transforms = (Normalize(mean=0.17, std=0.38), Read(places))
    test = Pages(Stdlib("test"), ROWS, COLUMNS, most=512)
    objective = NextToken(chunk=None, inputs=("tokens", "images"))
    return Experiment(
        model=VLM(
            vision=ViT(
                width=64,
                depth=2,
                mlp_dim=256,
                num_heads=4,
                patch=PATCH,
                num_classes=0,
                size=(ROWS * CELL[0], COLUMNS * CELL[1]),
                positions="sincos",
                pool="gap",
                unroll=2,  # Which a CPU is faster with.
            ),
            connector=Chain((Merge((1, letters // 2), GRID), Project(WIDTH, hidden=256))),
            language=Decoder(
                vocab=VOCAB,
                width=WIDTH,
                depth=3,
                mlp_dim=256,
                num_heads=4,
                positions="sinusoidal",
                embed_scale=WIDTH**0.5,
                unroll=3,
            ),
            image=IMAGE,
        ),
        objective=objective,
        optimizer=Muon(
            rate=Cosine(peak=0.01, warmup=0.1),
            newton_schulz=NewtonSchulz(dtype="float32"),
        ),
        data=Pipeline(Pages(Stdlib("train"), ROWS, COLUMNS), transforms),
        evals={"test": Pipeline(test, transforms)},
        tasks={"reading": Reading(Pipeline(test, transforms))},
        steps=2000,
        batch_size=16,
        eval_every=500,
        keep=Keep(every=500, metric="test/accuracy"),
        ema=0.99,
        flops=flops,
    )


def experiment() -> Experiment:
    """About three minutes on two CPU cores."""
    return page(4)
