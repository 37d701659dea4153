"""Scenes of several scanned digits, and questions about them whose answers are exact.

`Scenes("train")[i]` is a picture with some digits of `sources.Digits`, each in a cell of its
own; `Ask` makes of it one row of tokens with a question of every kind.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxformer.data.images import pixels_of
from jaxformer.data.sources import Digits, Record
from jaxformer.errors import InputError

_NAMES = "zeros ones twos threes fours fives sixes sevens eights nines"
NAMES = tuple(_NAMES.split())
PAD, IMAGE, END = 0, 1, 2
_SPECIAL = ("<pad>", "<image>", "<end>")
_SPOKEN = "which what how digit digits is are there on the left right largest sum many ?"
MOST = 3  # digits in a scene.
WORDS = (*_SPECIAL, *_SPOKEN.split(), *NAMES, *map(str, range(9 * MOST + 1)))
VOCAB = len(WORDS)
_IDS = {word: i for i, word in enumerate(WORDS)}

Digit = int
# A kind of question: its words, and the answer, by the digits from left to right and one
# digit that is asked for.
KINDS: dict[str, tuple[str, Callable[[list[Digit], Digit], str]]] = {
    "left": ("which digit is on the left ?", lambda digits, one: str(digits[0])),
    "right": ("which digit is on the right ?", lambda digits, one: str(digits[-1])),
    "read": ("which digits are there ?", lambda digits, one: " ".join(map(str, digits))),
    "largest": ("which digit is largest ?", lambda digits, one: str(max(digits))),
    "count": ("how many {} are there ?", lambda digits, one: str(digits.count(one))),
    "sum": ("what is the sum ?", lambda digits, one: str(sum(digits))),
}
READING = ("left", "right", "read")
_SCENE = ("image", "digits", "asked", "places")  # What a row of tokens is made of.


def encode(text: str) -> list[int]:
    """The ids of words between spaces.

    >>> decode(encode("how many sevens are there ?"))
    'how many sevens are there ?'

    Raises:
      InputError: a word that no scene is asked about with.
    """
    unknown = [word for word in text.split() if word not in _IDS]
    if unknown:
        raise InputError(
            f"{text!r}: {unknown[0]!r} is no word of the scenes; use {' '.join(WORDS)}"
        )
    return [_IDS[word] for word in text.split()]


def decode(ids) -> str:
    """The words of ids, up to the first end."""
    words = []
    for i in np.asarray(ids).tolist():
        if i == END:
            break
        words.append(WORDS[i])
    return " ".join(words)


@dataclass(frozen=True)
class Scenes:
    """`count` scenes of `size` pixels, each with `least` to 3 digits, no two in a column.

    `scenes[i]` is `{"image", "digits", "asked", "places"}`: float32 `[Y, X, 1]` in [0, 1];
    the digits from left to right, int32 `[3]`, -1 for none; the digit that is asked for, half
    of the time one of the scene; and the corner (row, column) of each digit, multiples of
    8, int32 `[3, 2]`. Scene i is the same whenever it is asked for. Digits of "train" and
    "test" are never the same scan.
    """

    split: str = "train"
    count: int = 100_000
    size: tuple[int, int] = (16, 32)
    least: int = 2
    seed: int = 0

    def __post_init__(self):
        Digits(self.split)
        if not 1 <= self.least <= MOST:
            raise InputError(f"least={self.least} must be from 1 to {MOST} digits")
        Y, X = self.size
        if Y % 8 or X % 8 or Y < 8 or X < 8 * MOST:
            raise InputError(
                f"size={self.size} must be multiples of 8 pixels, at least (8, {8 * MOST})"
            )

    @property
    def vocab(self) -> int:
        return VOCAB

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.count:
            raise IndexError(index)
        digits = _digits(self.split)
        draw = np.random.default_rng([self.split == "test", self.seed, index])
        Y, X = self.size
        n = int(draw.integers(self.least, MOST + 1))
        found = [digits[int(i)] for i in draw.integers(0, len(digits), n)]
        labels = [record["label"] for record in found]
        columns = 8 * np.sort(draw.choice(X // 8, n, replace=False))
        rows = 8 * draw.integers(0, Y // 8, n)
        image = np.zeros((Y, X, 1), np.float32)
        for record, y, x in zip(found, rows, columns, strict=True):
            image[y : y + 8, x : x + 8] = record["image"]
        asked = draw.choice(labels) if draw.random() < 0.5 else draw.integers(10)
        spare = MOST - n
        places = np.stack([rows, columns], 1)
        return {
            "image": image,
            "digits": np.pad(labels, (0, spare), constant_values=-1).astype(np.int32),
            "asked": np.int32(asked),
            "places": np.pad(places, ((0, spare), (0, 0))).astype(np.int32),
            "source": f"{self.split} scene {index}",
        }


@functools.cache
def _digits(split: str) -> Digits:
    return Digits(split)


def question(kind: str, record: Record) -> tuple[str, str]:
    """A question about a scene, and its answer."""
    text, answer = KINDS[kind]
    digits = [int(d) for d in record["digits"] if d >= 0]
    asked = int(record["asked"])
    return text.format(NAMES[asked]), answer(digits, asked)


@dataclass(frozen=True)
class Ask:
    """A transform: a scene with its questions as one row of `length` tokens.

    The record becomes `images` `[1, Y, X, C]`, float32, and int32 `tokens`, `segments` and
    `answer` `[length]`: first `places` tokens for the image, of segment 1, then question
    and answer of each of `kinds`, of segments 2 and on, which do not see each other;
    `answer` is 1 for the answers and their ends. `shared` is `places`, see
    `models.vlm.VLM`. `blind` paints the image black: what words alone tell.

    Raises:
      InputError: questions that do not go into the row, or an unknown kind.
    """

    places: int
    length: int
    kinds: tuple[str, ...] = tuple(KINDS)
    blind: bool = False

    def __post_init__(self):
        for kind in self.kinds:
            if kind not in KINDS:
                raise InputError(f"kinds: {kind!r} is none of {', '.join(KINDS)}")

    @property
    def end(self) -> int:
        """What closes an answer."""
        return END

    def prompt(self, question: str) -> list[int]:
        """The ids that an answer follows, of an image and a question in the scenes' words."""
        return [IMAGE] * self.places + encode(question)

    def word(self, token: int) -> str:
        """How a token of an answer reads."""
        return WORDS[token]

    def __call__(self, record: Record) -> Record:
        tokens, segments = [IMAGE] * self.places, [1] * self.places
        answer = [0] * self.places
        for number, kind in enumerate(self.kinds, 2):
            asked, said = (encode(text) for text in question(kind, record))
            tokens += [*asked, *said, END]
            answer += [0] * len(asked) + [1] * (len(said) + 1)
            segments += [number] * (len(asked) + len(said) + 1)
        spare = self.length - len(tokens)
        if spare < 0:
            raise InputError(
                f"length={self.length} is too short for {len(tokens)} tokens; make it "
                f"{len(tokens)} or ask fewer kinds"
            )
        image = pixels_of(record)
        rest = {name: x for name, x in record.items() if name not in _SCENE}
        rows = {"tokens": tokens, "segments": segments, "answer": answer}
        found = {name: np.pad(ids, (0, spare)).astype(np.int32) for name, ids in rows.items()}
        return (
            rest
            | found
            | {
                "images": np.zeros_like(image)[None] if self.blind else image[None],
                "shared": np.int32(self.places),
            }
        )
