"""A VQ-VAE on scanned digits: each becomes 4 x 4 codes of 64, and a digit again.

Data: scikit-learn's 1,797 digits of 8 x 8 pixels, 360 of them held out; no download.
Model: a VQ-VAE (arXiv 1711.00937) of 160,521 parameters, convolutions alone.
Expected: the squared error of a held-out pixel, which has variance 1, is 0.061 (`test/error`),
and of 64 codes 51.6 are in use, as if alike often (`test/codes`); 116 CPU seconds. Command:
    python -m train configs/vqvae_digits.py
"""

from jaxformer.data.augment import Affine
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Digits
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.vae import VQAutoencoder, flops
from jaxformer.objectives.autoencode import Autoencode
from jaxformer.optim import AdamW, Cosine


def experiment() -> Experiment:
    """A minute or two on two CPU cores; every number of it can be overridden."""
    normalize = Normalize(mean=(0.305,), std=(0.376,))
    return Experiment(
        model=VQAutoencoder(
            widths=(16, 32), depth=1, channels=1, latent=8, codes=64, groups=4, looks=False
        ),
        objective=Autoencode(),
        optimizer=AdamW(rate=Cosine(peak=2e-3, warmup=0.1), decay=0.0),
        data=Pipeline(Digits("train"), (Affine(shift=0.75, degrees=10, scale=0.1), normalize)),
        evals={"test": Pipeline(Digits("test"), (normalize,))},
        steps=1500,
        batch_size=64,
        ema=0.99,
        keep=Keep(every=500, metric="-test/error"),
        flops=flops,
    )
