"""ViT-g/14 on ImageNet-21k: a billion parameters of a plain classifier.

Paper: Zhai et al. 2022, arXiv 2106.04560, whose data (JFT-3B) is not public; the recipe here
is that of Steiner et al. 2022 for ImageNet-21k, arXiv 2106.10270, with `Rsqrt` as in the first.
Expected: nothing is known of this model on this data, and it was not run here. On 256 TPU v5p a
plan has 30 % of the peak, and 5.3 hours (docs/pods.md).
Data: `data/imagenet21k/train-*.array_record`, 14,197,122 images of 21,841 classes, as
`jaxformer.data.shards.write_array_record` makes them, and `validation.array_record`. Command:
    python -m train configs/vit_g14_imagenet21k.py --mesh data=4,fsdp=64
"""

import jax.numpy as jnp

from jaxformer.data.images import CenterCrop, Decode, Flip, Normalize, RandomResizedCrop, Resize
from jaxformer.data.loader import Pipeline
from jaxformer.data.shards import ArrayRecord
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.vit import flops, named
from jaxformer.objectives.classify import Classify
from jaxformer.optim import AdamW, Rsqrt

TRAIN, CLASSES, EPOCHS, BATCH = 14_197_122, 21_841, 30, 4096


def experiment() -> Experiment:
    """For a pod; the mesh is given with the command."""
    normalize = Normalize(mean=0.5, std=0.5)
    return Experiment(
        model=named("g/14", num_classes=CLASSES, pool="map", dtype=jnp.bfloat16, remat="dots"),
        objective=Classify(),
        optimizer=AdamW(
            rate=Rsqrt(peak=8e-4, warmup=10_000, timescale=10_000, cooldown=0.1),
            decay=0.03,
            clip=1.0,
            mu_dtype=jnp.bfloat16,
        ),
        data=Pipeline(
            ArrayRecord("data/imagenet21k/train-*.array_record", num_classes=CLASSES),
            (Decode(), RandomResizedCrop(224, area=(0.05, 1.0)), Flip(), normalize),
            workers=16,
        ),
        evals={
            "test": Pipeline(
                ArrayRecord("data/imagenet21k/validation.array_record", num_classes=CLASSES),
                (Decode(), Resize(256), CenterCrop(224), normalize),
            )
        },
        steps=EPOCHS * TRAIN // BATCH,
        batch_size=BATCH,
        eval_every=5_000,
        keep=Keep(every=1_000, metric="test/top1"),
        flops=flops,
    )
