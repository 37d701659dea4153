"""Documents cut and packed into rows of one length, of which no document sees another.

`source[i]` is `{"tokens", "segments"}`, int32 `[length]` each: segments count the documents
of a row from 1, and 0 is padding. Where it is known, `bytes` is how many bytes a token stands
for. Row i is the same whenever it is asked for, so that the loader's order, resume and
batches hold for text as for images.
"""

import bisect
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxformer.data.shards import Reopened
from jaxformer.data.sources import Record
from jaxformer.data.tokens import Part, Tokens, starts
from jaxformer.errors import InputError

_OPEN = 64  # rows that a thing is tried in before a new one is begun.


@dataclass(frozen=True)
class Rows(Reopened):
    """Documents one after the other, cut every `length - 1` tokens, for training.

    Rows overlap by one token, so that each but the first of a document is a target once.
    `most` takes so many of the rows, evenly from all.

    Raises:
      InputError: rows shorter than 2 tokens, or an id beyond the vocabulary.
    """

    tokens: Tokens
    length: int
    most: int | None = None

    def __post_init__(self):
        _check_length(self.length)
        if self.most is not None and self.most < 1:
            raise InputError(f"most={self.most} must be 1 row or more, or None for all")

    @property
    def vocab(self) -> int:
        return self.tokens.vocab

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The first row of each part."""
        step = self.length - 1
        return starts([max(1, -(-(len(p.ids) - 1) // step)) for p in self.tokens.parts])

    def __len__(self) -> int:
        every = self._starts[-1]
        return every if self.most is None else min(self.most, every)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        every = self._starts[-1]
        index = index if self.most is None else index * every // len(self)
        number = bisect.bisect_right(self._starts, index) - 1
        part = self.tokens.parts[number]
        start = (index - self._starts[number]) * (self.length - 1)
        stop = min(start + self.length, len(part.ids))
        segments = np.searchsorted(part.ends, np.arange(start, stop), "right")
        record = {"segments": segments - segments[0] + 1}
        return _record(self.tokens, part, start, stop, self.length, record, f"row {index}")


@dataclass(frozen=True)
class Windows(Reopened):
    """Each document in windows that overlap, for evaluation: `answer` marks what counts.

    A window is `length` tokens and begins `stride` tokens after the last; of each but the
    first only the last `stride` tokens count, which have at least `length - stride` before
    them. Every token but the first of a document counts once. A document's end counts too.

    Raises:
      InputError: a stride that is not below the length, or an id beyond the vocabulary.
    """

    tokens: Tokens
    length: int
    stride: int

    def __post_init__(self):
        _check_length(self.length)
        if not 1 <= self.stride < self.length:
            raise InputError(
                f"stride={self.stride} must be from 1 to length - 1 = {self.length - 1}; half "
                "the length is usual"
            )

    @property
    def vocab(self) -> int:
        return self.tokens.vocab

    @functools.cached_property
    def _places(self) -> list[tuple[int, int, int, int]]:
        """(part, start, stop, first that counts) of each window."""
        places = []
        for number, part in enumerate(self.tokens.parts):
            begin = 0
            for end in part.ends.tolist():
                found = windows(begin, end, self.length, self.stride)
                places += [(number, *place) for place in found]
                begin = end
        return places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        number, start, stop, counted = self._places[index]
        at = np.arange(start, stop)
        record = {"segments": np.ones_like(at), "answer": at >= counted}
        part = self.tokens.parts[number]
        where = f"window {index}"
        return _record(self.tokens, part, start, stop, self.length, record, where)


def first_fit(sizes: Iterable[Sequence[int]], room: Sequence[int]) -> list[list[int]]:
    """Which things share a row: each goes into the first of the last 64 with room for it.

    Args:
      sizes: of each thing, by one or more measures; none is above `room`.
      room: of a row, by the same.

    Example:
      >>> first_fit([(5,), (4,), (3,)], (8,))
      [[0, 2], [1]]
    """
    rows: list[list[int]] = []
    left: list[np.ndarray] = []
    for number, size in enumerate(sizes):
        recent = range(max(0, len(rows) - _OPEN), len(rows))
        row = next((r for r in recent if (left[r] >= size).all()), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(np.array(room))
        rows[row].append(number)
        left[row] = left[row] - size
    return rows


def windows(begin: int, end: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first that counts) of a document's windows, see `Windows`."""
    counted, start = begin + 1, begin
    while counted < end:
        stop = min(start + length, end)
        yield start, stop, counted
        counted, start = stop, start + stride


def _record(
    tokens: Tokens, part: Part, start: int, stop: int, length: int, record: Record, where: str
) -> Record:
    """Tokens from `start` to before `stop` with what goes beside them, padded."""
    ids = part.ids[start:stop].astype(np.int32)
    if ids.max() >= tokens.vocab:
        raise InputError(
            f"{where}: token {start + int(ids.argmax())} has id {ids.max()}, beyond "
            f"vocab={tokens.vocab}; give the vocabulary the tokens were made with"
        )
    record = {"tokens": ids, **record}
    if tokens.lengths is not None:
        record["bytes"] = tokens.lengths[ids]
    spare = (0, length - len(ids))
    padded = {name: np.pad(x.astype(np.int32), spare) for name, x in record.items()}
    return padded | {"source": where}


def _check_length(length: int) -> None:
    if length < 2:
        raise InputError(f"length={length} must be 2 tokens or more")
