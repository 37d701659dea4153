"""DiT-XL/2 on ImageNet-1k latents, 7 million steps: the paper's headline.

Paper: Peebles and Xie 2022, arXiv 2212.09748. Cost: 118.6 G multiply-adds an image forward.
Expected: Frechet distance 2.27 with guidance 1.5, 50,000 samples of 250 steps of DDPM; 19.5
after 400,000 steps without guidance (both theirs). We have not run it: nobody here has the
images.
Data: ImageNet-1k at 256 pixels, centre-cropped and encoded once by the autoencoder of Stable
Diffusion (`sd-vae-ft-ema`, loaded by `jaxformer.convert`) into
`data/imagenet_latents/train-*.array_record`, 32 x 32 x 4, by
`jaxformer.data.latents.write_latents`: one file of the images and one of them mirrored.
Command:
    python -m train configs/dit_xl2_imagenet.py
"""

import jax.numpy as jnp

from jaxformer.data.latents import Draw
from jaxformer.data.loader import Pipeline
from jaxformer.data.shards import ArrayRecord
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.dit import flops, named
from jaxformer.objectives.condition import Classes
from jaxformer.objectives.gaussian import Gaussian
from jaxformer.optim import AdamW, Constant


def experiment() -> Experiment:
    """The recipe by its numbers; theirs computes in float32."""
    latents = ArrayRecord("data/imagenet_latents/train-*.array_record", num_classes=1000)
    return Experiment(
        model=named("XL/2", learned_variance=True, remat="dots", dtype=jnp.bfloat16),
        objective=Gaussian(Classes(1000)),
        optimizer=AdamW(rate=Constant(1e-4), decay=0.0, clip=None),
        data=Pipeline(latents, (Draw(scale=0.18215),), workers=8),
        steps=7_000_000,
        batch_size=256,
        ema=0.9999,
        keep=Keep(every=10_000),
        flops=flops,
    )
