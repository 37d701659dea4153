"""A KL autoencoder on scanned digits: each becomes 4 x 4 x 2 numbers, and a digit again.

Data: scikit-learn's 1,797 digits of 8 x 8 pixels, 360 of them held out; no download.
Model: the autoencoder of latent diffusion (arXiv 2112.10752) of 157,007 parameters.
Expected: the squared error of a held-out pixel, which has variance 0.56, is 0.047
(`test/error`); 98 CPU seconds. The other commands keep the latents, which ldm_digits.py
learns from, and tell the scale that would give them variance 1, which is 0.92. Commands:
    python -m train configs/kl_digits.py
    python -m evaluate.latents configs/kl_digits.py train runs/kl_digits/train.array_record
    python -m evaluate.latents configs/kl_digits.py test runs/kl_digits/test.array_record
"""

from jaxformer.data.augment import Affine
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Digits
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.vae import KLAutoencoder, flops
from jaxformer.objectives.autoencode import Autoencode
from jaxformer.optim import AdamW, Cosine


def experiment() -> Experiment:
    """A minute or two on two CPU cores; every number of it can be overridden."""
    normalize = Normalize(mean=0.5, std=0.5)  # To [-1, 1].
    train, test = (Pipeline(Digits(split), (normalize,)) for split in ("train", "test"))
    moved = Affine(shift=0.75, degrees=10, scale=0.1)
    return Experiment(
        model=KLAutoencoder(
            widths=(16, 32), depth=1, channels=1, latent=2, groups=4, looks=False, scale=1.0
        ),
        objective=Autoencode(kl=1e-4),
        optimizer=AdamW(rate=Cosine(peak=2e-3, warmup=0.1), decay=0.0),
        data=Pipeline(train.source, (moved, normalize)),
        evals={"train": train, "test": test},
        steps=600,
        batch_size=64,
        ema=0.99,
        keep=Keep(every=600, metric="-test/error"),
        flops=flops,
    )
