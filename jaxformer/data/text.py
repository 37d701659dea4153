"""Text as tokens: Unicode names letter by letter, and any text by a tokenizer's file.

For names, the alphabet is that of Unicode's: space, hyphen, digits and capitals. Token 0 is
padding, 1 the end of the text, and the letters follow.
"""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from jaxformer.data import tokenizer
from jaxformer.data.sources import Record
from jaxformer.errors import InputError

ALPHABET = " -0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PAD, END = 0, 1
VOCAB = 2 + len(ALPHABET)

_TOKENS = {letter: 2 + i for i, letter in enumerate(ALPHABET)}


def encode(text: str, length: int) -> Int[np.ndarray, " T"]:
    """The letters of `text`, an end token, and padding up to `length`, as int32.

    >>> encode("A-B", 6).tolist()
    [14, 3, 15, 1, 0, 0]

    Raises:
      InputError: a letter outside the alphabet, or no room for all and the end.
    """
    unknown = [letter for letter in text if letter not in _TOKENS]
    if unknown:
        raise InputError(
            f"{text!r}: {unknown[0]!r} is no letter of Unicode's names; use A to Z, 0 to 9, "
            "space and hyphen"
        )
    if len(text) >= length:
        raise InputError(
            f"{text!r}: {len(text)} letters and an end do not go into length={length}; "
            f"give {len(text) + 1} or more"
        )
    tokens = np.full(length, PAD, np.int32)
    tokens[: len(text)] = [_TOKENS[letter] for letter in text]
    tokens[len(text)] = END
    return tokens


def decode(tokens: Int[np.ndarray, " T"]) -> str:
    """The text before the first end token; padding says nothing.

    Raises:
      InputError: a token outside the vocabulary.
    """
    letters = []
    for token in np.asarray(tokens).tolist():
        if not 0 <= token < VOCAB:
            raise InputError(f"token {token} is not one of the {VOCAB}, 0 to {VOCAB - 1}")
        if token == END:
            break
        letters += [ALPHABET[token - 2]] if token != PAD else []
    return "".join(letters)


@dataclass(frozen=True)
class Spell:
    """A transform: the record's `text` becomes `tokens`, int32 `[length]`, see `encode`."""

    length: int

    def __call__(self, record: Record) -> Record:
        rest = {name: value for name, value in record.items() if name != "text"}
        return rest | {"tokens": encode(record["text"], self.length)}


@dataclass(frozen=True)
class Caption:
    """A transform: a class is told in words, `names[label]`, letter by letter.

    Adds `tokens`, int32 `[length]`, see `encode`, and `real`, bool `[length]`: what of them
    is no padding. A label of `len(names)` is none: nothing of it is real.

    >>> Caption(("NO", "YES"), 4).table[1].sum(1).tolist()
    [3, 4, 0]

    Raises:
      InputError: a letter outside the alphabet, no room for a name, or no name of a label.
    """

    names: tuple[str, ...]
    length: int

    @functools.cached_property
    def table(self) -> tuple[Int[np.ndarray, "V T"], Bool[np.ndarray, "V T"]]:
        """Tokens and what is real of them for every label, the last of which is none."""
        rows = [encode(name, self.length) for name in self.names]
        tokens = np.stack([*rows, np.full(self.length, PAD, np.int32)])
        return tokens, tokens != PAD

    def __call__(self, record: Record) -> Record:
        label = record["label"]
        if not 0 <= label <= len(self.names):
            raise InputError(
                f"{record.get('source', 'label')}: class {label} has none of the "
                f"{len(self.names)} names; give one to each class"
            )
        tokens, real = self.table
        return record | {"tokens": tokens[label], "real": real[label]}


@dataclass(frozen=True)
class Tokenize:
    """A transform: the record's `text` becomes `tokens`, int32 `[length]`.

    `path` is a `tokenizer.json` as Hugging Face's tokenizers write it. What is too long is
    cut; `end` is put at the end where it is given, and `pad` fills the rest.

    Raises:
      InputError: no such file, or it is no tokenizer.
    """

    path: str
    length: int
    pad: int = 0
    end: int | None = None

    def __call__(self, record: Record) -> Record:
        rest = {name: value for name, value in record.items() if name != "text"}
        ids = tokenizer.read(self.path).encode(record["text"]).ids
        end = [] if self.end is None else [self.end]
        ids = [*ids[: self.length - len(end)], *end]
        tokens = np.full(self.length, self.pad, np.int32)
        tokens[: len(ids)] = ids
        return rest | {"tokens": tokens}
