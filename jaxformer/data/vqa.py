"""Conversations about images in LLaVA's layout, and a check of all of them.

A line of JSON is `{"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human",
"value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}`; `image` may be a list,
or not there. Parquet has the same columns, and may hold the images themselves. Source of the
layout: Liu et al. 2023, arXiv 2304.08485, and the data of its release.
"""

import functools
import io
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxformer.data.corpus import Lines
from jaxformer.data.images import FORMATS, Decode
from jaxformer.data.rows import first_fit
from jaxformer.data.shards import ParquetConversations, Reopened, files
from jaxformer.data.sources import Record
from jaxformer.data.templates import MARK, PLAIN, Template, encode
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.errors import InputError

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class Fault(NamedTuple):
    """What is wrong with one sample: `where` is FILE:LINE or FILE[ROW], `sample` its id."""

    where: str
    sample: str | None
    what: str

    def __str__(self) -> str:
        named = "" if self.sample is None else f" (sample {self.sample})"
        return f"{self.where}{named}: {self.what}"


@dataclass(frozen=True)
class Dialogues(Reopened):
    """Each line a row of `length` tokens and up to `most` images, of which answers are learned.

    `paths` are JSON Lines or, where the first ends in `.parquet`, Parquet. `source[i]` is int32
    `tokens`, `segments` and `answer` `[length]` and float32 `images`
    `[most, Y, X, C]`. Turns are written as `template` says, see `data.templates`; each
    `<image>` in them becomes `features` times the token `image`. `answer` is 1 for what the
    assistant says and the end of it. A row is never cut, so that no image is cut in two.
    `transforms` take the encoded file, as the record `{"image": bytes}`, to a float32 image
    of `size`, (rows, columns, channels).

    Raises:
      InputError: of a line with a fault, by file, line and sample. `check` names all.
    """

    paths: str | tuple[str, ...]
    root: str  # the folder in which images lie.
    tokenizer: Tokenizer
    length: int
    image: int
    features: int
    size: tuple[int, int, int]
    transforms: tuple[Callable[[Record], Record], ...] = (Decode(),)
    most: int = 1
    max_pixels: int = 64 * 2**20
    max_aspect: float = 20.0
    template: Template = PLAIN

    @property
    def vocab(self) -> int:
        return max(self.tokenizer.vocab, self.image + 1)

    @functools.cached_property
    def _lines(self) -> Lines | ParquetConversations:
        parquet = files(self.paths)[0].endswith(".parquet")
        return ParquetConversations(self.paths) if parquet else Lines(self.paths)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        return self.row([index])

    def row(self, indices: Sequence[int]) -> Record:
        """Some lines as one row, each a segment: their tokens and images side by side."""
        row = {n: np.zeros(self.length, np.int32) for n in ("tokens", "segments", "answer")}
        images = np.zeros((self.most, *self.size), np.float32)
        start = seen = 0
        for number, index in enumerate(indices, 1):
            record = self._whole(index)
            ids, answer = self._encoded(record)
            place = slice(start, start + len(ids))
            row["tokens"][place], row["answer"][place] = ids, answer
            row["segments"][place] = number
            start += len(ids)
            for name in _named(record):
                images[seen] = self._pixels(name, record["source"])
                seen += 1
        sources = [self._lines[index]["source"] for index in indices]
        return row | {"images": images, "source": ", ".join(sources)}

    def sizes(self, index: int) -> tuple[int, int]:
        """Tokens and images of a line."""
        record = self._whole(index)
        return len(self._encoded(record)[0]), len(_named(record))

    def _whole(self, index: int) -> Record:
        """A line without a fault."""
        record = self._lines[index]
        wrong = next(self._faults(record), None)
        if wrong is not None:
            raise InputError(f"{_fault(record, wrong)}; correct it, or leave the line out")
        return record

    def _pixels(self, name: str | bytes, where: str) -> np.ndarray:
        if isinstance(name, bytes):
            made: Record = {"image": name, "source": where}
        else:
            made = {"image": self._file(name).read_bytes(), "source": name}
        for transform in self.transforms:
            made = transform(made)
        if made["image"].shape != self.size or made["image"].dtype != np.float32:
            found = f"{made['image'].dtype} {made['image'].shape}"
            raise InputError(
                f"{made['source']}: becomes {found} and must become float32 {self.size}; "
                "end the transforms with a crop and Normalize()"
            )
        return made["image"]

    def faults(self, pixels: bool = True) -> Iterator[Fault]:
        """Every fault of every line; with `pixels` images are decoded whole.

        Without, only their headers are read: what is cut off behind them goes unseen.
        """
        lines = self._lines
        for index in range(len(lines)):
            try:
                record = lines[index]
            except InputError as error:
                where, _, what = str(error).partition(": ")
                yield Fault(where, None, what)
                continue
            for what in self._faults(record, pixels):
                yield _fault(record, what)

    def check(self, pixels: bool = False) -> None:
        """Raises InputError that names every fault, by file, line and sample.

        A run calls it before its first step; `check(pixels=True)` once decodes all images.
        """
        found = list(self.faults(pixels))
        if found:
            raise InputError(
                f"{len(found)} faults in {len(self)} lines; correct them, or leave the lines "
                "out:\n" + "\n".join(map(str, found))
            )

    def _faults(self, record: Record, pixels: bool = False) -> Iterator[str]:
        names = _named(record)
        if not all(isinstance(name, str | bytes) and name for name in names):
            yield '"image" is neither the name of a file nor its bytes nor a list of such'
            names = []
        said = record.get("conversations")
        turns = list(_wrong_turns(said))
        yield from turns
        if not turns:
            marks = sum(turn["value"].count(MARK) for turn in said or [])
            if marks != len(names):
                yield f"has {marks} {MARK} and {len(names)} images; write one for each image"
            elif len(ids := self._encoded(record)[0]) > self.length:
                yield f"has {len(ids)} tokens, images and all, and a row length={self.length}"
        if len(names) > self.most:
            yield f"has {len(names)} images and a row most={self.most}"
        for number, name in enumerate(names):
            wrong = self._wrong_image(name, pixels)
            if wrong is not None:
                yield f"{name if isinstance(name, str) else f'image {number}'} {wrong}"

    def _file(self, name: str) -> pathlib.Path:
        return pathlib.Path(self.root) / name

    def _wrong_image(self, name: str | bytes, pixels: bool) -> str | None:
        missing, data = False, None
        try:
            if isinstance(name, bytes):
                data = name
                file: Any = io.BytesIO(data)
            else:
                root = pathlib.Path(self.root).resolve()
                file = (root / name).resolve()
                if not file.is_relative_to(root):
                    return "lies outside of the folder of images"
                missing = not file.is_file()
                if pixels:
                    data = file.read_bytes()
            with Image.open(file, formats=FORMATS) as image:
                x, y = image.size
        except OSError as error:
            return "is not there" if missing else f"is no image ({type(error).__name__})"
        except (ValueError, Image.DecompressionBombError) as error:
            return f"is no image that can be opened ({type(error).__name__})"
        if x * y > self.max_pixels:
            return f"has {x} x {y} pixels, above max_pixels={self.max_pixels}"
        if max(x, y) > self.max_aspect * min(x, y):
            return f"has {x} x {y} pixels, longer than max_aspect={self.max_aspect:g} to 1"
        if pixels and data is not None:
            try:
                Decode(self.max_pixels)({"image": data, "source": name})
            except InputError:
                return "is cut short or damaged"
        return None

    def _encoded(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Ids and 1 for those that are learned."""
        said = [(_ROLES[turn["from"]], turn["value"]) for turn in record["conversations"]]
        return encode(said, self.template, self.tokenizer, [self.image] * self.features)


@dataclass(frozen=True)
class PackedDialogues(Reopened):
    """`dialogues` whose rows have several lines each, as many as `length` and `most` allow.

    A line is a segment of its row, so that none sees another, and goes into the first row that
    has room for its tokens and images, of the last 64. All lines are encoded when the first row
    is asked for. Their model takes `segments`, see `models.vlm.VLM`.
    """

    dialogues: Dialogues

    @property
    def vocab(self) -> int:
        return self.dialogues.vocab

    @functools.cached_property
    def _rows(self) -> list[list[int]]:
        sizes = map(self.dialogues.sizes, range(len(self.dialogues)))
        return first_fit(sizes, (self.dialogues.length, self.dialogues.most))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self.dialogues.row(self._rows[index])

    def check(self, pixels: bool = False) -> None:
        """See `Dialogues.check`."""
        self.dialogues.check(pixels)


def _named(record: Record) -> list[Any]:
    """The images of a line, by name or as bytes."""
    found = record.get("image")
    if found is None:
        return []
    return found if isinstance(found, list) else [found]


def _fault(record: Record, what: str) -> Fault:
    sample = record.get("id")
    return Fault(record["source"], None if sample is None else str(sample), what)


def _wrong_turns(said: Any) -> Iterator[str]:
    """What is wrong with the turns of a conversation."""
    if not isinstance(said, list) or not said:
        yield 'has no "conversations", a list of turns {"from": "human", "value": "..."}'
        return
    before = None
    for number, turn in enumerate(said):
        whole = isinstance(turn, dict) and isinstance(turn.get("value"), str)
        if not whole or turn.get("from") not in _ROLES:
            yield f'turn {number} is none of {", ".join(_ROLES)} with a "value" that is text'
            return
        role, text = _ROLES[turn["from"]], turn["value"]
        if role == "system":
            if number:
                yield f"turn {number} is of system, which may only come first"
            continue
        if role == before:
            yield f"turn {number} is of who spoke before"
        if before is None and role == "assistant":
            yield f"turn {number} begins with the assistant"
        if not text.replace(MARK, "").strip():
            yield f"turn {number} is an empty {'answer' if role == 'assistant' else 'question'}"
        if role == "assistant" and MARK in text:
            yield f"turn {number} is an answer with {MARK} in it"
        before = role
    if before == "user":
        yield "ends with a question that has no answer"
