"""Documents as one long row of ids: from texts and a tokenizer, or from files of ids.

What `rows` cuts up. Both have `vocab`; `parts`, arrays of ids with where in each its
documents end; and `lengths`, how many bytes an id stands for, or None.
"""

import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxformer.data.corpus import not_empty
from jaxformer.data.shards import Reopened, files
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.errors import InputError

_DOCUMENTS = 256  # tokenized at a time.
TYPES = ("uint16", "uint32")
# What begins a file of llm.c's: for ids of GPT-2 and of Llama 3 (dev/data/data_common.py).
LLM_C = {"uint16": (20240520, 1), "uint32": (20240801, 7)}
LLM_C_BYTES = 1024


class Part(NamedTuple):
    """Ids of documents one after the other, and where each of them ends."""

    ids: Int[np.ndarray, " n"]
    ends: Int[np.ndarray, " documents"]


@dataclass(frozen=True)
class Tokenized(Reopened):
    """Documents by a tokenizer, with its begin and end around each; kept in memory.

    For more text than that, write `Shards` once (`python -m train.tokenizer`).

    Raises:
      InputError: an empty document.
    """

    source: Any  # of records with `text` and `source`, such as `corpus.Stdlib`.
    tokenizer: Tokenizer

    @property
    def vocab(self) -> int:
        return self.tokenizer.vocab

    @property
    def lengths(self) -> Int[np.ndarray, " V"]:
        return self.tokenizer.lengths

    @property
    def parts(self) -> tuple[Part, ...]:
        return (_tokenized(self.source, self.tokenizer),)


@functools.cache
def _tokenized(source: Any, tokenizer: Tokenizer) -> Part:
    documents = list(encoded(source, tokenizer))
    ends = np.cumsum([len(ids) for ids in documents])
    return Part(np.concatenate(documents), ends)


def encoded(source: Any, tokenizer: Tokenizer):
    """Ids of each document of a source, with begin and end, as small as they go."""
    dtype = _type(tokenizer.vocab)
    around = [[] if i is None else [i] for i in (tokenizer.begin, tokenizer.end)]
    for first in range(0, len(source), _DOCUMENTS):
        records = [source[i] for i in range(first, min(first + _DOCUMENTS, len(source)))]
        texts = [not_empty(r["text"], r.get("source", "a record")) for r in records]
        for ids in tokenizer.encode(texts):
            yield np.concatenate([around[0], ids, around[1]]).astype(dtype)


@dataclass(frozen=True)
class Shards(Reopened):
    """Files of ids, one long row each: `.npy`, or plain `.bin` of `dtype`, uint16 or uint32.

    What llm.c puts before the ids of its `.bin` is known and left out. They are mapped, and
    read as they are asked for. Where documents end is told by the file beside a shard,
    `x.ends.npy` for `x.npy`, as `write_shard` writes it; where there is none, by the id
    `end`, which closes a document; without either a shard is one document.

    Raises:
      InputError: a file is missing or no row of ids; ids beyond `vocab`, from the rows.
    """

    paths: str | tuple[str, ...]
    vocab: int
    end: int | None = None
    dtype: str = "uint16"  # of .bin files.
    lengths: Any = None

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """A shard each."""
        named = [path for path in files(self.paths) if not path.endswith(".ends.npy")]
        return tuple(self._part(path) for path in named)

    def _part(self, path: str) -> Part:
        ids = self._map(path)
        if not len(ids):
            raise InputError(f"{path}: holds no token; leave the file out")
        beside = os.path.splitext(path)[0] + ".ends.npy"
        if os.path.isfile(beside):
            ends = np.load(beside)
            if not len(ends) or ends[-1] != len(ids) or (np.diff(ends) < 1).any():
                raise InputError(f"{beside}: is not of {path}; write both again")
        elif self.end is not None:
            ends = np.flatnonzero(ids == self.end) + 1
        else:
            ends = np.zeros(0, np.int64)
        if not len(ends) or ends[-1] != len(ids):
            ends = np.append(ends, len(ids))
        return Part(ids, ends)

    def _map(self, path: str) -> np.ndarray:
        if self.dtype not in TYPES:
            raise InputError(f"dtype={self.dtype!r} must be one of {', '.join(TYPES)}")
        try:
            if path.endswith(".npy"):
                ids = np.load(path, mmap_mode="r")
            else:
                ids = np.memmap(path, self.dtype, "r", offset=_before(path, self.dtype))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: is no file of ids ({error}); write it again") from error
        if ids.ndim != 1 or ids.dtype.name not in TYPES:
            raise InputError(
                f"{path}: is {ids.dtype} {list(ids.shape)}; a shard is one row of "
                f"{' or '.join(TYPES)}"
            )
        return ids


def _before(path: str, dtype: str) -> int:
    """Bytes of llm.c's header, if the file has one: a magic number, a version, a count."""
    *magic, count = np.fromfile(path, "<i4", 3).tolist() or (0, 0)
    if tuple(magic) != LLM_C[dtype]:
        return 0
    ids = (os.path.getsize(path) - LLM_C_BYTES) // np.dtype(dtype).itemsize
    if ids != count:
        raise InputError(f"{path}: has {ids} ids, and says {count} of itself; fetch it again")
    return LLM_C_BYTES


Tokens = Tokenized | Shards  # Or what has the same names.


def write_shard(path: str, source: Any, tokenizer: Tokenizer) -> int:
    """Writes the documents of a source as one shard with its ends; returns its tokens.

    Raises:
      InputError: the name does not end in .npy, or a document is empty.
    """
    if not path.endswith(".npy"):
        raise InputError(f"{path}: a shard's name ends in .npy")
    lengths: list[int] = []

    def ids():
        for document in encoded(source, tokenizer):
            lengths.append(len(document))
            yield document

    dtype = _type(tokenizer.vocab)
    scratch = f"{path}.part"
    with open(scratch, "wb") as file:
        for document in ids():
            document.tofile(file)
    count = sum(lengths)
    with open(path, "wb") as file, open(scratch, "rb") as body:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        while block := body.read(1 << 24):
            file.write(block)
    os.remove(scratch)
    np.save(f"{os.path.splitext(path)[0]}.ends.npy", np.cumsum(lengths))
    return count


def starts(counts: Sequence[int]) -> list[int]:
    """Where each of several begins, laid one after the other, and where the last ends."""
    return list(itertools.accumulate(counts, initial=0))


def _type(vocab: int) -> str:
    return TYPES[0] if vocab <= 1 << 16 else TYPES[1]
