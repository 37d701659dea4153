"""Retrieval: the text that belongs to an image among all of them, and the other way."""

from dataclasses import dataclass

import numpy as np

from evaluate.features import Features, image, text
from evaluate.run import Trained
from jaxformer import metrics, probe
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Record


@dataclass(frozen=True)
class Retrieval:
    """How often the right one is among the first 1, 5 or 10 of all of `test`, by cosine.

    A record has an image and its text; where records share a `label`, each one's text is
    right for the other's image. Every device holds all features and judges its share of
    the queries, a chunk of keys at a time. Gives `image_to_text@1`, `@5`, `@10`, and
    `text_to_image@1` and so on.
    """

    test: Pipeline
    image: Features = image
    text: Features = text

    def run(self, trained: Trained) -> metrics.Metrics:
        def both(apply, params, batch):
            sides = [side(apply, params, batch) for side in (self.image, self.text)]
            return *sides, batch["label"]

        images, texts, labels = trained.collect(both, self.test)

        def measure(apply, params, batch, keys, labels):
            rank = probe.ranks(batch["query"], batch["label"], keys, labels)
            return probe.recall(rank, batch["weight"])

        found = {}
        for name, queries, keys in (
            ("image_to_text", images, texts),
            ("text_to_image", texts, images),
        ):
            rows = Pipeline(_Rows(queries, labels))
            part = trained.measure(measure, rows, keys, labels)
            found |= {f"{name}@{k}": part[f"@{k}"] for k in probe.AT}
        return found


@dataclass(frozen=True, eq=False)
class _Rows:
    """Features as a source of records."""

    queries: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        return {"query": self.queries[index], "label": self.labels[index]}
