"""Linear probe: logistic regression on features that stay as they are."""

import functools
from dataclasses import dataclass

import jax

from evaluate.features import Features, check_classes, labelled, num_classes, pooled
from evaluate.run import Trained
from jaxformer import metrics, probe
from jaxformer.data.loader import Pipeline


@dataclass(frozen=True)
class LinearProbe:
    """Fits a linear classifier on the features of `train`, and counts it on `test`.

    Features are made by all devices; each process then fits on one device of its own, to
    the same answer on any mesh: see `jaxformer.probe.fit` for `l2`, `steps` and the
    scaling. Neither pipeline has a random transform. Gives `loss` (nats), `top1`, `top5`.
    """

    train: Pipeline
    test: Pipeline
    features: Features = pooled
    l2: float = 1e-3
    steps: int = 200

    def check(self) -> None:
        """Raises InputError where the two have other classes."""
        check_classes(self.train, self.test)

    def run(self, trained: Trained) -> metrics.Metrics:
        features, labels = trained.collect(
            functools.partial(labelled, self.features), self.train
        )
        V = num_classes(self.train)
        fit = functools.partial(probe.fit, num_classes=V, l2=self.l2, steps=self.steps)
        linear = jax.jit(fit)(features, labels)

        def measure(apply, params, batch, linear):
            logits = linear.logits(self.features(apply, params, batch))
            found = metrics.classification(logits, batch["label"], batch["weight"])
            return {name: found[name] for name in ("loss", "top1", "top5")}

        return trained.measure(measure, self.test, linear)
