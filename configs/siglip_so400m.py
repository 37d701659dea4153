"""SigLIP So400m/14 at 224 pixels, on images with texts of your own.

Paper: Zhai et al. 2023, arXiv 2303.15343; the shape of the towers is that of Alabdulmohsin
et al. 2023, arXiv 2305.13035. 877,415,602 parameters.
Expected: nothing of our own, as it was not run: nobody here has the images. On 256 TPU v5e a
plan has 32 % of the peak with model.remat=full; with dots it does not fit them (docs/pods.md).
Data: Parquet with the columns `image` (bytes) and `text` under `data/pairs/`, and the
tokenizer of `google/siglip-so400m-patch14-224` as `data/pairs/tokenizer.json`. Command:
    python -m train configs/siglip_so400m.py --mesh data=4,fsdp=64
"""

import dataclasses

import jax.numpy as jnp

from configs.siglip_b16 import experiment as base
from jaxformer.data.images import Decode, Normalize, RandomResizedCrop, Resize
from jaxformer.data.loader import Pipeline
from jaxformer.data.shards import Captions
from jaxformer.data.text import Tokenize
from jaxformer.experiment import Experiment
from jaxformer.models.siglip import named


def experiment() -> Experiment:
    """Ten billion pairs, by the recipe of the small one."""
    normalize = Normalize(mean=0.5, std=0.5)
    tokenize = Tokenize("data/pairs/tokenizer.json", length=16, pad=1)
    crop = RandomResizedCrop(224, area=(0.8, 1.0))
    return dataclasses.replace(
        base(),
        model=named("So400m/14@224", remat="dots", dtype=jnp.bfloat16),
        data=Pipeline(
            Captions("data/pairs/train-*.parquet"),
            (Decode(), crop, normalize, tokenize),
            workers=16,
        ),
        evals={
            "test": Pipeline(
                Captions("data/pairs/test-*.parquet"),
                (Decode(), Resize(224), normalize, tokenize),
            )
        },
        steps=305_000,
        batch_size=32_768,
    )
