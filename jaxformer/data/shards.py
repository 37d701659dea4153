"""Sources that are many records to a file: Parquet and ArrayRecord."""

import bisect
import functools
import glob
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import grain
import numpy as np

from jaxformer.data.sources import Record
from jaxformer.errors import InputError

_HEADER_LIMIT = 256  # bytes; a longer one is no record of ours.
_GROUPS_KEPT = 4  # row groups of Parquet in memory, in each process.


@dataclass(frozen=True)
class Reopened:
    """Leaves what was opened behind when it is pickled for a worker process."""

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class _Rows(Reopened):
    """Rows of Parquet files, of which four row groups stay in memory, never a whole file."""

    paths: str | tuple[str, ...]

    @property
    def _columns(self) -> tuple[str, ...]:
        raise NotImplementedError

    @functools.cached_property
    def _groups(self) -> tuple[list[tuple[str, int, int]], list[int]]:
        """(file, group, its first row) for each row group, and where each one ends."""
        groups, sizes = [], []
        for path in files(self.paths):
            file = _open_parquet(path)
            for name in self._columns:
                if name not in file.schema_arrow.names:
                    raise InputError(
                        f"{path}: has no column {name!r} but "
                        f"{', '.join(file.schema_arrow.names)}; name the columns to read"
                    )
            first = 0
            for group in range(file.metadata.num_row_groups):
                groups.append((path, group, first))
                sizes.append(file.metadata.row_group(group).num_rows)
                first += sizes[-1]
        return groups, list(itertools.accumulate(sizes))

    @functools.cached_property
    def _table(self):
        return functools.lru_cache(_GROUPS_KEPT)(self._read)

    def _read(self, path: str, group: int):
        import pyarrow

        try:
            return _open_parquet(path).read_row_group(group, list(self._columns))
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(
                f"{path}: row group {group} is damaged; fetch the file again"
            ) from error

    def __len__(self) -> int:
        return self._groups[1][-1] if self._groups[1] else 0

    def _row(self, index: int) -> tuple[tuple[Any, ...], str]:
        """The values of the columns in one row, and where it is."""
        groups, ends = self._groups
        number, row = _locate(ends, index)
        path, group, first = groups[number]
        table = self._table(path, group)
        values = tuple(table.column(name)[row].as_py() for name in self._columns)
        return values, f"{path}[{first + row}]"


@dataclass(frozen=True)
class Parquet(_Rows):
    """Parquet files as Hugging Face writes them, read by row group.

    The image column is a struct with a field `bytes`, or plain binary; the label column
    holds integers. `paths` is a file, a pattern (`data/train-*.parquet`) or several.
    Four row groups stay in memory, never a whole file. Shuffled reading takes a whole
    row group for almost every record: to train on more than a few gigabytes, write
    groups of few rows or rewrite the records with `write_array_record`.

    Raises:
      InputError: a file is missing or damaged, lacks a column, or has a label outside
        [0, num_classes).
    """

    num_classes: int
    image: str = "image"
    label: str = "label"

    @property
    def _columns(self) -> tuple[str, ...]:
        return self.image, self.label

    def __getitem__(self, index: int) -> Record:
        (image, label), where = self._row(index)
        label = _label(label, self.num_classes, where)
        return {"image": _bytes(image, self.image, where), "label": label, "source": where}


@dataclass(frozen=True)
class Captions(_Rows):
    """Parquet files of images with a text each: `{"image", "text", "source"}`.

    Columns and reading are as `Parquet`'s; a text that is a list gives its first.

    Raises:
      InputError: a file is missing or damaged, lacks a column, or a text is none.
    """

    image: str = "image"
    text: str = "text"

    @property
    def _columns(self) -> tuple[str, ...]:
        return self.image, self.text

    def __getitem__(self, index: int) -> Record:
        (image, text), where = self._row(index)
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str):
            raise InputError(f"{where}: column {self.text!r} holds no text; leave that row out")
        return {"image": _bytes(image, self.image, where), "text": text, "source": where}


@dataclass(frozen=True)
class ParquetText(_Rows):
    """Parquet files of documents: `{"text", "source"}` of one column. Reading is `Parquet`'s.

    Raises:
      InputError: a file is missing or damaged, lacks the column, or a text is none or empty.
    """

    text: str = "text"

    @property
    def _columns(self) -> tuple[str, ...]:
        return (self.text,)

    def __getitem__(self, index: int) -> Record:
        (text,), where = self._row(index)
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"{where}: column {self.text!r} holds no text or an empty one; leave that row "
                "out"
            )
        return {"text": text, "source": where}


@dataclass(frozen=True)
class ParquetConversations(_Rows):
    """Parquet files of conversations about images: `{"image", "conversations", "source"}`.

    Columns are named as LLaVA's, see `data.vqa`. An image is the name of a file, or a struct
    with a field `bytes`, or a list of such; the struct becomes its bytes, or its `path` where
    it has none. Reading is `Parquet`'s.

    Raises:
      InputError: a file is missing or damaged, or lacks a column.
    """

    @property
    def _columns(self) -> tuple[str, ...]:
        return "image", "conversations"

    def __getitem__(self, index: int) -> Record:
        (image, said), where = self._row(index)
        images = image if isinstance(image, list) else [] if image is None else [image]
        images = [x.get("bytes") or x.get("path") if isinstance(x, dict) else x for x in images]
        return {"image": images, "conversations": said, "source": where}


def _bytes(image: Any, column: str, where: str) -> bytes:
    if isinstance(image, dict):
        image = image.get("bytes")
    if not isinstance(image, bytes):
        raise InputError(
            f"{where}: column {column!r} holds no image bytes; write the "
            "images into the file, not their paths"
        )
    return image


def _open_parquet(path: str):
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError('Parquet needs pyarrow; run pip install "jaxformer[train]"') from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: is not a whole Parquet file; fetch it again") from error


@dataclass(frozen=True)
class ArrayRecord(Reopened):
    """ArrayRecord files that `write_array_record` wrote: random access at full speed.

    `paths` is a file, a pattern (`data/train-*.array_record`) or several.

    Raises:
      InputError: a file is missing or damaged, a record is not in the encoding of
        `write_array_record`, or a label is outside [0, num_classes).
    """

    paths: str | tuple[str, ...]
    num_classes: int

    @functools.cached_property
    def _readers(self) -> tuple[list[tuple[str, Any]], list[int]]:
        readers = []
        for path in files(self.paths):
            try:
                readers.append((path, grain.sources.ArrayRecordDataSource(path)))
            except (RuntimeError, ValueError, OSError) as error:
                raise InputError(
                    f"{path}: is not a whole ArrayRecord file; write it again"
                ) from error
        return readers, list(itertools.accumulate(len(r) for _, r in readers))

    def __len__(self) -> int:
        return self._readers[1][-1]

    def __getitem__(self, index: int) -> Record:
        readers, ends = self._readers
        number, row = _locate(ends, index)
        path, reader = readers[number]
        where = f"{path}[{row}]"
        try:
            image, label = _decode(reader[row])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{where}: is not a record as write_array_record writes it; "
                "write the file again"
            ) from error
        label = _label(label, self.num_classes, where)
        return {"image": image, "label": label, "source": where}


def write_array_record(path: str, records: Iterable[Record]) -> None:
    r"""Writes records to one ArrayRecord file.

    A record is one line of JSON and then the image:
    `{"label": 3}\n` and the bytes of an encoded image (PNG, JPEG, ...), or
    `{"label": 3, "dtype": "uint8", "shape": [32, 32, 3]}\n` and the pixels, row by row,
    little endian, of dtype uint8 or float32. Nothing in it is code.

    Raises:
      InputError: an image that is neither bytes nor such an array.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a group: Grain's condition for fast random access.
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
    try:
        for row, record in enumerate(records):
            writer.write(_encode(record, f"{path}[{row}]"))
    finally:
        writer.close()


def _encode(record: Record, where: str) -> bytes:
    image, header = record["image"], {"label": int(record["label"])}
    if not isinstance(image, bytes):
        dtype = np.dtype(image.dtype)
        if dtype not in (np.uint8, np.float32) or image.ndim != 3:
            raise InputError(
                f"{where}: an image is bytes or a uint8 or float32 array [Y, X, C], "
                f"not {dtype} {list(image.shape)}; convert it first"
            )
        header |= {"dtype": dtype.name, "shape": image.shape}
        image = image.astype(dtype.newbyteorder("<")).tobytes()
    return json.dumps(header).encode() + b"\n" + image


def _decode(data: bytes) -> tuple[bytes | np.ndarray, Any]:
    end = data.index(b"\n", 0, _HEADER_LIMIT)
    header, body = json.loads(data[:end]), data[end + 1 :]
    if "dtype" not in header:
        return body, header["label"]
    dtype = {"uint8": "<u1", "float32": "<f4"}[header["dtype"]]
    Y, X, C = header["shape"]
    return np.frombuffer(body, dtype).reshape(Y, X, C), header["label"]


def files(paths: str | Sequence[str]) -> list[str]:
    """The files that paths and patterns name, each pattern's in order of name.

    Raises:
      InputError: there are none.
    """
    named = []
    for path in [paths] if isinstance(paths, str) else paths:
        found = [path] if os.path.isfile(path) else sorted(glob.glob(path))
        if not found:
            raise InputError(
                f"{path}: no such file; give files or a pattern such as train-*.parquet"
            )
        named += found
    if not named:
        raise InputError("paths names no file; give files or a pattern")
    return named


def _locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """(part, row in it) of record `index`, where part i ends before `ends[i]`."""
    if not 0 <= index < (ends[-1] if ends else 0):
        raise IndexError(index)
    part = bisect.bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


def _label(value: Any, num_classes: int, where: str) -> int:
    if type(value) is not int or not 0 <= value < num_classes:
        raise InputError(
            f"{where}: label {value!r} is not an integer from 0 to {num_classes - 1}; "
            "correct the label or num_classes"
        )
    return value
