"""Where images come from: `source[i]` is `{"image", "label", "source"}`.

`image` is an array `[Y, X, C]` (uint8, or float32 in [0, 1]) or the `bytes` of an
encoded file, `label` an int below `num_classes`, and `source` the name that an error
uses for this record; it never reaches a batch. Any object with `len`, `[]` and
`num_classes` will do, if it can be pickled for worker processes. The ones here are
frozen dataclasses that open nothing until the first record or length is asked for.
"""

import functools
import os
import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxformer.errors import InputError

Record = dict[str, Any]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Digits:
    """Scikit-learn's 1,797 scanned handwritten digits, `[8, 8, 1]` float32 in [0, 1].

    360 are the "test" split, each class with its share; 1,437 are "train". The split
    is the same on every machine. From Alpaydin and Kaynak, "Optical Recognition of
    Handwritten Digits", UCI, 1998.

    >>> len(Digits("train")), len(Digits("test")), Digits().num_classes
    (1437, 360, 10)

    Raises:
      InputError: another split, or scikit-learn is not installed.
    """

    split: str = "train"

    def __post_init__(self):
        if self.split not in ("train", "test"):
            raise InputError(
                f"Digits has no split {self.split!r}; the splits are train and test"
            )

    @property
    def num_classes(self) -> int:
        return 10

    @functools.cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise InputError(
                'Digits needs scikit-learn; run pip install "jaxformer[train]"'
            ) from None
        pixels, labels = load_digits(return_X_y=True)
        rows = np.flatnonzero(_held_out(labels, 360) == (self.split == "test"))
        images = (pixels[rows].reshape(-1, 8, 8, 1) / 16).astype(np.float32)
        images.flags.writeable = False  # every record is a view.
        return images, labels[rows], rows

    def __len__(self) -> int:
        return len(self._data[0])

    def __getitem__(self, index: int) -> Record:
        images, labels, rows = self._data
        return {
            "image": images[index],
            "label": int(labels[index]),
            "source": f"digits[{rows[index]}]",
        }


def _held_out(labels: np.ndarray, held: int) -> np.ndarray:
    """Marks `held` rows so that every class has its share, to within one row."""
    exact = np.bincount(labels) * held / len(labels)
    take = np.floor(exact).astype(int)
    take[np.argsort(take - exact, kind="stable")[: held - take.sum()]] += 1
    rng = np.random.RandomState(0)  # NumPy has frozen this stream, not Generator's.
    mask = np.zeros(len(labels), bool)
    for label, count in enumerate(take):
        mask[rng.permutation(np.flatnonzero(labels == label))[:count]] = True
    return mask


@dataclass(frozen=True)
class ImageFolder:
    """A folder of one folder a class: `root/class/*.png|jpg|jpeg|webp|bmp`.

    A class's label is its place among the folders sorted by name (`classes`); folders
    and files whose names start with a dot are left out, and so are other suffixes.

    Raises:
      InputError: no such folder, no class in it, or a class without images.
    """

    root: str

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The folders' names; a label is a place in here."""
        if not os.path.isdir(self.root):
            raise InputError(
                f"{self.root}: no such folder; give one that holds a folder a class"
            )
        with os.scandir(self.root) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and e.name[0] != ".")
        if not names:
            raise InputError(
                f"{self.root}: holds no folders; images go into one folder a class"
            )
        return tuple(names)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @functools.cached_property
    def _index(self) -> list[tuple[str, int]]:
        index = []
        for label, name in enumerate(self.classes):
            folder = os.path.join(self.root, name)
            names = [n for n in os.listdir(folder) if _is_image(n)]
            if not names:
                raise InputError(
                    f"{folder}: holds no image ({' '.join(_SUFFIXES)}); "
                    "add some or remove the folder"
                )
            index += [(os.path.join(folder, n), label) for n in sorted(names)]
        return index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        path, label = self._index[index]
        try:
            image = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); restore or remove it"
            ) from error
        return {"image": image, "label": label, "source": path}


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(_SUFFIXES)
