"""k-nearest neighbours on features: what they are worth without any fit."""

import functools
from dataclasses import dataclass

from evaluate.features import Features, check_classes, labelled, num_classes, pooled
from evaluate.run import Trained
from jaxformer import metrics, probe
from jaxformer.data.loader import Pipeline
from jaxformer.errors import InputError


@dataclass(frozen=True)
class KNN:
    """Classes of `test` by votes of the `k` nearest in `train`, as DINO counts them.

    Caron et al. 2021 (arXiv:2104.14294); see `jaxformer.probe.vote`. Every device holds
    the features of `train` and judges its share of `test`. Gives `top1` and `top5`.
    """

    train: Pipeline
    test: Pipeline
    features: Features = pooled
    k: int = 20
    temperature: float = 0.07

    def check(self) -> None:
        """Raises InputError where the two have other classes, or `k` does not fit."""
        check_classes(self.train, self.test)
        if not 1 <= self.k <= len(self.train.source):
            raise InputError(
                f"k={self.k} neighbours must be from 1 to the {len(self.train.source)} records "
                "of train"
            )

    def run(self, trained: Trained) -> metrics.Metrics:
        bank = trained.collect(functools.partial(labelled, self.features), self.train)

        def measure(apply, params, batch, keys, labels):
            scores = probe.vote(
                self.features(apply, params, batch),
                keys,
                labels,
                num_classes=num_classes(self.train),
                k=self.k,
                temperature=self.temperature,
            )
            return metrics.top(scores, batch["label"], batch["weight"])

        return trained.measure(measure, self.test, *bank)
