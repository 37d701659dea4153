"""MAE on scanned digits: pre-trained without labels, then judged by a linear probe.

Data: scikit-learn's 1,797 digits of 8 x 8 pixels, 360 of them held out; no download.
Model: a masked autoencoder (arXiv 2111.06377) that is shown 6 of 16 patches.
Expected: see "Measured" in the README; `pixels` is what the same probe and neighbours find
without a model. Command:
    python -m train configs/mae_digits.py
    python -m evaluate configs/mae_digits.py --checkpoint runs/mae_digits
"""

from evaluate.features import pixels
from evaluate.knn import KNN
from evaluate.linear import LinearProbe
from evaluate.pictures import Reconstruction
from jaxformer.data.augment import Affine
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Digits
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.mae import MAE, flops
from jaxformer.models.vit import Size
from jaxformer.objectives.reconstruct import Reconstruct
from jaxformer.optim import Cosine, Muon, NewtonSchulz


def experiment() -> Experiment:
    """Three minutes on two CPU cores; every number of it can be overridden."""
    normalize = Normalize(mean=0.305, std=0.376)
    train = Pipeline(Digits("train"), (normalize,))
    test = Pipeline(Digits("test"), (normalize,))
    return Experiment(
        model=MAE(
            encoder=Size(width=64, depth=4, mlp_dim=256, num_heads=4),
            decoder=Size(width=48, depth=2, mlp_dim=192, num_heads=4),
            patch=2,
            ratio=0.6,
            pool="gap",
            remat="dots",
        ),
        objective=Reconstruct(patch=2, normalize=False),
        optimizer=Muon(
            rate=Cosine(peak=0.02, warmup=0.1),
            newton_schulz=NewtonSchulz(dtype="float32"),
        ),
        data=Pipeline(Digits("train"), (Affine(shift=0.75, degrees=10, scale=0.1), normalize)),
        evals={"test": test},
        tasks={
            "probe": LinearProbe(train, test),
            "knn": KNN(train, test),
            "pixels_probe": LinearProbe(train, test, features=pixels),
            "pixels_knn": KNN(train, test, features=pixels),
        },
        pictures={"filled": Reconstruction(test)},
        steps=2000,
        batch_size=128,
        ema=0.98,
        keep=Keep(every=500, metric="-test/loss"),
        eval_every=500,
        flops=flops,
    )
