"""Pictures beside what an encoder sees of them, for a model that learns to say it (REPA)."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from evaluate.encoder import Encoder
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Record
from jaxformer.sharding import make_mesh


def tokens(apply, params, batch):
    """A vision model's tokens after its last block: its method `encode`."""
    return apply({"params": params}, batch["image"], method="encode")


@dataclass(frozen=True)
class Seen:
    """The records of `source` with `seen` `[T, D]`, what `encoder` makes of each picture.

    All of them are looked at once, when the first is asked for, and kept in memory: the
    encoder does not run in training. So nothing that moves pixels may come after it.
    """

    source: Any
    encoder: Encoder

    @property
    def num_classes(self) -> int:
        """The source's."""
        return self.source.num_classes

    def check(self) -> None:
        """Raises InputError where there is no encoder."""
        self.encoder.check()
        getattr(self.source, "check", lambda: None)()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.source[index] | {"seen": self._seen[index]}

    @functools.cached_property
    def _seen(self) -> np.ndarray:
        model, transforms = self.encoder.load(make_mesh("", jax.local_devices()))
        return model.collect(tokens, Pipeline(self.source, transforms))
