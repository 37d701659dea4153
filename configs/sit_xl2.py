"""SiT-XL/2: DiT-XL/2 learned by a straight path from data to noise, and not by DDPM's chain.

Paper: Ma et al. 2024, arXiv 2401.08740. Cost: 118.6 G multiply-adds an image forward. Theirs is
told the time as it is, 1 at the data; ours, as DiT's, in thousandths, 0 at the data.
Expected: Frechet distance 2.06 with guidance 1.5, 50,000 samples of 250 steps of the SDE; 8.3
without guidance (both theirs). We have not run it: nobody here has the images.
Data: ImageNet-1k at 256 pixels, centre-cropped and encoded once by the autoencoder of Stable
Diffusion (`sd-vae-ft-ema`, loaded by `jaxformer.convert`) into
`data/imagenet_latents/train-*.array_record`, 32 x 32 x 4, by
`jaxformer.data.latents.write_latents`: one file of the images and one of them mirrored.
Command:
    python -m train configs/sit_xl2.py
"""

import jax.numpy as jnp

from jaxformer.data.latents import Draw
from jaxformer.data.loader import Pipeline
from jaxformer.data.shards import ArrayRecord
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.dit import flops, named
from jaxformer.objectives.condition import Classes
from jaxformer.objectives.flow import Flow
from jaxformer.optim import AdamW, Constant


def experiment() -> Experiment:
    """The recipe by its numbers; theirs computes in float32."""
    latents = ArrayRecord("data/imagenet_latents/train-*.array_record", num_classes=1000)
    return Experiment(
        model=named("XL/2", remat="dots", dtype=jnp.bfloat16),
        objective=Flow(Classes(1000)),
        optimizer=AdamW(rate=Constant(1e-4), decay=0.0, clip=None),
        data=Pipeline(latents, (Draw(scale=0.18215),), workers=8),
        steps=7_000_000,
        batch_size=256,
        ema=0.9999,
        keep=Keep(every=10_000),
        flops=flops,
    )
