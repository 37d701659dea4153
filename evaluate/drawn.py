"""What a model draws, judged beside real pictures by somebody who never saw its pictures."""

from dataclasses import dataclass

import jax
import numpy as np

from evaluate.draw import Draw
from evaluate.encoder import Encoder, Look
from evaluate.features import Features, num_classes, pooled
from evaluate.run import Trained
from jaxformer import distances, metrics
from jaxformer.data import statistics
from jaxformer.data.loader import Pipeline
from jaxformer.errors import InputError


@dataclass(frozen=True)
class Drawn:
    """Distances of `count` pictures to those of `train`, in the eyes of `encoder`.

    Labels go round: each class has its share. Beside the distances stand, of `test`, the
    same from `train`, which is what real pictures of that number are apart. With a
    `classifier` the encoder's logits say too how many pictures are read as the class that
    was asked for, and the inception score. `protocol` is all that the numbers depend on.

    Real pictures are those of the sources alone, without their pipelines' transforms. With
    `reference`, a file that `evaluate.reference` wrote, Frechet distances are to its
    statistics, and all other numbers to `train` as without.
    """

    draw: Draw
    encoder: Encoder
    train: Pipeline
    test: Pipeline | None = None
    count: int = 1000
    features: Features = pooled
    classifier: bool = True
    neighbours: int = 3
    reference: str | None = None

    def check(self) -> None:
        """Raises InputError where there is no encoder or autoencoder, too few pictures, or a
        reference of another encoder or of pictures of another size.
        """
        if self.count < self.neighbours + 2:
            raise InputError(
                f"count={self.count} must be {self.neighbours + 2} or more for "
                f"neighbours={self.neighbours}"
            )
        self.encoder.check()
        self.draw.check()
        if self.reference is not None:
            held = statistics.load(self.reference)
            if held.encoder != self.encoder.name:
                raise InputError(
                    f"{self.reference}: is of {held.encoder or 'an encoder without a name'}, "
                    f"and {self.encoder.name} looks at the pictures; write it again with that "
                    "encoder, or set reference=None"
                )
            if held.size and held.size != self.size:
                sizes = [" x ".join(map(str, size)) for size in (held.size, self.size)]
                raise InputError(
                    f"{self.reference}: is of pictures of {sizes[0]} pixels, and {sizes[1]} "
                    "are drawn; write it again, of pictures of that size"
                )

    @property
    def size(self) -> tuple[int, ...]:
        """Rows and columns of a picture."""
        return self.draw.size

    def run(self, trained: Trained) -> metrics.Metrics:
        labels = np.arange(self.count) % num_classes(self.train)
        given = None if self.draw.classes(trained) is None else labels.tolist()
        images = self.draw.images(trained, given, self.count)
        model, transforms = self.encoder.load(trained.mesh)
        look = Look(model, transforms, self.features)
        drawn, logits = look.at_images(images)
        real, _ = look.at(self.train)
        name = self.encoder.name
        if self.reference is None:
            reference = distances.statistics(real, name, self.size)
        else:
            reference = statistics.load(self.reference)
        found = self._beside(reference, real, drawn, name)
        if self.classifier:
            found |= _classified(logits, None if given is None else labels)
        about = {"count": self.count, "encoder": name, "reference": reference.digest}
        about |= {"real": reference.count, "neighbours": self.neighbours}
        if self.test is not None:
            held, _ = look.at(self.test)
            for name_, one in self._beside(reference, real, held, name).items():
                found[f"test_{name_}"] = one
        found["protocol"] = metrics.Note(about | self.draw.about(trained), np.int64(self.count))
        return found

    def _beside(self, reference, real, features, name) -> metrics.Metrics:
        """Of a set of features, beside the real ones."""
        found = distances.statistics(features, name, self.size)
        precision, recall = distances.precision_recall(real, features, self.neighbours)
        values = {
            "frechet": distances.frechet(reference, found),
            "kernel": distances.kernel_distance(real, features),
            "precision": precision,
            "recall": recall,
        }
        count = np.int64(len(features))
        return {n: metrics.Whole(np.float64(v), count) for n, v in values.items()}


def _classified(logits, labels) -> metrics.Metrics:
    count = np.int64(len(logits))
    score = distances.inception_score(np.asarray(jax.nn.softmax(logits)))
    found: metrics.Metrics = {"inception": metrics.Whole(np.float64(score), count)}
    if labels is not None:
        right = np.int64((logits.argmax(-1) == labels).sum())
        found["as_asked"] = metrics.Mean(right, count)
    return found
