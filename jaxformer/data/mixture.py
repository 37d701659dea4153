"""Several sources as one: an epoch has each record of each as often as that source says.

The loader shuffles all of it together, so that order, resume and batches hold for a mixture
as for its parts.
"""

import bisect
import functools
from dataclasses import dataclass
from typing import Any

from jaxformer.data.shards import Reopened
from jaxformer.data.sources import Record
from jaxformer.data.tokens import starts
from jaxformer.errors import InputError


@dataclass(frozen=True)
class Mixture(Reopened):
    """Sources of alike records, one after the other; source i comes `times[i]` times.

    >>> from jaxformer.data.sources import Digits
    >>> len(Mixture((Digits("train"), Digits("test")), times=(1, 3)))
    2517

    Raises:
      InputError: no source, another number of times than of sources, one below 1, an empty
        source, or a record with other entries than those of the first.
    """

    parts: tuple[Any, ...]
    times: tuple[int, ...] | None = None  # None: each once.

    def __post_init__(self):
        if not self.parts:
            raise InputError("parts of a mixture are empty; name one source or more")
        if self.times is not None and len(self.times) != len(self.parts):
            raise InputError(
                f"times={self.times} are {len(self.times)} for {len(self.parts)} sources; "
                "give one for each"
            )
        if self.times is not None and min(self.times) < 1:
            raise InputError(f"times={self.times} must be 1 or more; leave a source out")

    @property
    def vocab(self) -> int:
        """Of tokens: beyond the ids of every part."""
        return max(part.vocab for part in self.parts)

    @property
    def num_classes(self) -> int:
        """Of labels, which mean the same in every part."""
        return max(part.num_classes for part in self.parts)

    @functools.cached_property
    def _starts(self) -> list[int]:
        """Where each part begins, as often as it comes, and where the last ends."""
        times = self.times or (1,) * len(self.parts)
        for number, part in enumerate(self.parts):
            if not len(part):
                raise InputError(f"source {number} of a mixture is empty; leave it out")
        return starts([n * len(part) for n, part in zip(times, self.parts, strict=True)])

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.parts[0][0])

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        part = self.parts[number]
        record = part[(index - self._starts[number]) % len(part)]
        if record.keys() != self._names:
            raise InputError(
                f"source {number} of a mixture has records of {', '.join(sorted(record))}, and "
                f"source 0 of {', '.join(sorted(self._names))}; mix sources of alike records"
            )
        return record
