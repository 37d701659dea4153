"""SigLIP B/16 at 256 pixels, on images with texts of your own.

Paper: Zhai et al. 2023, arXiv 2303.15343. Cost: theirs saw 40 billion pairs.
Expected: with as much data, 76.7 % zero-shot on ImageNet (theirs, WebLI). We have not run
it: nobody here has the images.
Data: Parquet with the columns `image` (bytes) and `text` under `data/pairs/`, and the
tokenizer of `google/siglip-base-patch16-256` as `data/pairs/tokenizer.json`. Command:
    python -m train configs/siglip_b16.py
"""

import jax.numpy as jnp

from jaxformer.data.images import Decode, Normalize, RandomResizedCrop, Resize
from jaxformer.data.loader import Pipeline
from jaxformer.data.shards import Captions
from jaxformer.data.text import Tokenize
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.clip import flops
from jaxformer.models.siglip import named
from jaxformer.objectives.contrast import Contrast
from jaxformer.optim import AdamW, Cosine


def experiment() -> Experiment:
    """A billion pairs; every number of it can be overridden."""
    normalize = Normalize(mean=0.5, std=0.5)
    tokenize = Tokenize("data/pairs/tokenizer.json", length=64, pad=1)
    return Experiment(
        model=named("B/16@256", remat="dots", dtype=jnp.bfloat16),
        objective=Contrast(link="sigmoid"),
        optimizer=AdamW(rate=Cosine(peak=1e-3, warmup=0.02), b2=0.95, decay=1e-4),
        data=Pipeline(
            Captions("data/pairs/train-*.parquet"),
            (Decode(), RandomResizedCrop(256, area=(0.8, 1.0)), normalize, tokenize),
            workers=16,
        ),
        evals={
            "test": Pipeline(
                Captions("data/pairs/test-*.parquet"),
                (Decode(), Resize(256), normalize, tokenize),
            )
        },
        steps=60_000,
        batch_size=16_384,
        eval_every=2_000,
        keep=Keep(every=1_000, metric="test/image_to_text"),
        flops=flops,
    )
