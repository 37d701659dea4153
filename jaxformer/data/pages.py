"""Pages: text of files drawn as pictures, to be read back as text.

The font is the bitmap that Pillow carries, 6 x 11 black and white pixels a letter, each in a
cell of 6 x 12: the same picture on every machine. A page is full: its text runs on from row
to row as in a terminal, and the end of a line is drawn as a pilcrow, so that a page of R rows
and C columns is of R * C letters, to the last one.
"""

import bisect
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxformer.data.images import pixels_of
from jaxformer.data.shards import Reopened
from jaxformer.data.sources import Record
from jaxformer.data.tokens import starts
from jaxformer.errors import InputError

CELL = (12, 6)  # pixels of a letter, (rows, columns).
PAD, IMAGE = 0, 1
LETTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCAB = 2 + len(LETTERS)
_IDS = {letter: 2 + i for i, letter in enumerate(LETTERS)}
_END = "\N{PILCROW SIGN}"


def encode(text: str) -> list[int]:
    """An id for each letter.

    >>> decode(encode("x = 1"))
    'x = 1'

    Raises:
      InputError: a letter that is not drawn.
    """
    unknown = [letter for letter in text if letter not in _IDS]
    if unknown:
        raise InputError(f"{unknown[0]!r} is not drawn; use printable ASCII and line ends")
    return [_IDS[letter] for letter in text]


def decode(ids) -> str:
    """The letters of ids; what is none says nothing."""
    return "".join(LETTERS[i - 2] for i in np.asarray(ids).tolist() if 2 <= i < VOCAB)


def draw(text: str, columns: int) -> UInt8[np.ndarray, "Y X 1"]:
    """The picture of a full page: white letters on black, 0 or 255."""
    table, ids = _cells(), np.array(encode(text)) - 2
    rows = len(text) // columns
    cells = table[ids.reshape(rows, columns)]  # [R, C, 12, 6]
    return cells.swapaxes(1, 2).reshape(rows * CELL[0], columns * CELL[1], 1)


@dataclass(frozen=True)
class Pages(Reopened):
    """Documents cut into full pages: `pages[i]` is `{"image", "text", "source"}`.

    `image` is as `draw` makes it, `text` of `rows * columns` letters. No page has text of
    two documents, none overlap, and what is left of a document at its end is no page. Tabs
    are eight spaces, and letters that are not drawn are left out. `most` takes so many of
    the pages, evenly from all.

    Raises:
      InputError: a page without a letter.
    """

    documents: Any  # a source of texts, see `data.corpus`.
    rows: int = 4
    columns: int = 32
    most: int | None = None

    def __post_init__(self):
        if self.rows < 1 or self.columns < 1:
            raise InputError(
                f"rows={self.rows} and columns={self.columns} must be 1 or more letters"
            )

    @property
    def vocab(self) -> int:
        return VOCAB

    @property
    def size(self) -> tuple[int, int]:
        """Pixels, (rows, columns)."""
        return self.rows * CELL[0], self.columns * CELL[1]

    @functools.cached_property
    def _texts(self) -> list[tuple[str, str]]:
        every = (self.documents[i] for i in range(len(self.documents)))
        return [(record["source"], _drawn(record["text"])) for record in every]

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The first page of each document."""
        return starts([len(text) // (self.rows * self.columns) for _, text in self._texts])

    def __len__(self) -> int:
        every = self._starts[-1]
        return every if self.most is None else min(self.most, every)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        page = index * self._starts[-1] // len(self)
        number = bisect.bisect_right(self._starts, page) - 1
        name, text = self._texts[number]
        first = (page - self._starts[number]) * self.rows * self.columns
        text = text[first : first + self.rows * self.columns]
        source = f"{name}, from letter {first}"
        return {"image": draw(text, self.columns), "text": text, "source": source}


@dataclass(frozen=True)
class Read:
    """A transform: a page as one row of tokens, its image first and then its text.

    The record becomes `images` `[1, Y, X, 1]`, float32, and int32 `tokens` and `answer`
    `[places + letters]`: `places` tokens for the image and the ids of the text, for which
    `answer` is 1. `blind` paints the image black: what the text alone tells of itself.
    """

    places: int
    blind: bool = False

    def __call__(self, record: Record) -> Record:
        ids, image = encode(record["text"]), pixels_of(record)
        rest = {name: x for name, x in record.items() if name not in ("image", "text")}
        return rest | {
            "images": np.zeros_like(image)[None] if self.blind else image[None],
            "tokens": np.array([IMAGE] * self.places + ids, np.int32),
            "answer": np.array([0] * self.places + [1] * len(ids), np.int32),
        }


def _drawn(text: str) -> str:
    return "".join(letter for letter in text.expandtabs(8) if letter in _IDS)


@functools.cache
def _cells() -> UInt8[np.ndarray, "V Y X"]:
    """The picture of each letter, in the order of `LETTERS`."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise InputError('pages need Pillow; run pip install "jaxformer[train]"') from None
    font, (Y, X) = ImageFont.load_default_imagefont(), CELL
    image = Image.new("L", (X * len(LETTERS), Y))
    ImageDraw.Draw(image).text((0, 0), LETTERS.replace("\n", _END), fill=255, font=font)
    cells = np.asarray(image).reshape(Y, len(LETTERS), X).swapaxes(0, 1)
    cells.flags.writeable = False
    return cells
