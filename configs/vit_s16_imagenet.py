"""ViT-S/16 on ImageNet-1k, 90 epochs: the plain baseline of big_vision.

Paper: Beyer et al. 2022, arXiv 2205.01580. Cost: 6 to 7 hours on a TPU v3-8.
Expected: 76.5 % top-1 (theirs). We have not run it: nobody here has the images.
Data: `data/imagenet/train.array_record` and Parquet for validation, as Hugging Face has it
(`data/imagenet/validation-*.parquet`); `jaxformer.data.shards.write_array_record` makes the
one from the other. Command:
    python -m train configs/vit_s16_imagenet.py
"""

import jax.numpy as jnp

from jaxformer.data.augment import RandAugment
from jaxformer.data.images import CenterCrop, Decode, Flip, Normalize, RandomResizedCrop, Resize
from jaxformer.data.loader import Pipeline
from jaxformer.data.mix import Mixup
from jaxformer.data.shards import ArrayRecord, Parquet
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.vit import flops, named
from jaxformer.objectives.classify import Classify
from jaxformer.optim import AdamW, Cosine

TRAIN, EPOCHS, BATCH = 1_281_167, 90, 1024


def experiment() -> Experiment:
    """The recipe by its numbers; theirs holds out 1 % of the training images besides."""
    normalize = Normalize(mean=0.5, std=0.5)
    steps = EPOCHS * TRAIN // BATCH
    return Experiment(
        model=named(
            "S/16",
            num_classes=1000,
            positions="sincos",
            pool="gap",
            dtype=jnp.bfloat16,
        ),
        objective=Classify(),
        optimizer=AdamW(
            rate=Cosine(peak=1e-3, warmup=10_000 / steps),
            decay=0.1,  # Times the rate; their 1e-4 is not.
            clip=1.0,
            mu_dtype=jnp.bfloat16,
        ),
        data=Pipeline(
            ArrayRecord("data/imagenet/train.array_record", num_classes=1000),
            (
                Decode(),
                RandomResizedCrop(224, area=(0.05, 1.0)),
                Flip(),
                RandAugment(layers=2, magnitude=10),
                normalize,
            ),
            (Mixup(0.2, 1000),),
            workers=16,
        ),
        evals={
            "test": Pipeline(
                Parquet("data/imagenet/validation-*.parquet", num_classes=1000),
                (Decode(), Resize(256), CenterCrop(224), normalize),
            )
        },
        steps=steps,
        batch_size=BATCH,
        eval_every=5_000,
        keep=Keep(every=1_000, metric="test/top1"),
        flops=flops,
    )
