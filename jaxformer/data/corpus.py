"""Where texts come from: `source[i]` is `{"text", "source"}`.

`text` is one document, a str that is not empty, and `source` the name that an error uses
for it. Texts in Parquet are `shards.ParquetText`.
"""

import functools
import hashlib
import json
import os
import pathlib
import sysconfig
from dataclasses import dataclass
from typing import Any

from jaxformer.data.shards import Reopened, files
from jaxformer.data.sources import Record
from jaxformer.errors import InputError

_HELD = 10  # one file of so many is held out.
# What others have installed, tests, which not every system has, and what is data: tables of
# letters, and help as one string.
_LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}


@dataclass(frozen=True)
class Stdlib(Reopened):
    """The running Python's own standard library, as code: one document a file.

    About 10 MB, without Python's own tests; a tenth of the files is "test". The split goes
    by a file's name and is the same on every machine, but the files are those of the running
    Python. Empty files and those that are not UTF-8 are left out.

    Raises:
      InputError: another split.
    """

    split: str = "train"

    def __post_init__(self):
        if self.split not in ("train", "test"):
            raise InputError(
                f"Stdlib has no split {self.split!r}; the splits are train and test"
            )

    @functools.cached_property
    def _texts(self) -> list[tuple[str, str]]:
        return [(n, t) for n, t in _stdlib() if held_out(n) == (self.split == "test")]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Record:
        name, text = self._texts[index]
        return {"text": text, "source": name}


def held_out(name: str) -> bool:
    """Whether a file of this relative name belongs to the test split of `Stdlib`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % _HELD == 0


@functools.cache
def _stdlib() -> list[tuple[str, str]]:
    """Name and text of every file, by name."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for path in (pathlib.Path(folder, name) for name in names if name.endswith(".py")):
            try:
                text = path.read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                found.append((path.relative_to(root).as_posix(), text))
    return sorted(found)


@dataclass(frozen=True)
class TextFiles(Reopened):
    """Text files in UTF-8, each one document: a file, a pattern (`books/*.txt`) or several.

    Raises:
      InputError: no such file, or one that is empty or not UTF-8.
    """

    paths: str | tuple[str, ...]

    @functools.cached_property
    def _files(self) -> list[str]:
        return files(self.paths)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        path = self._files[index]
        try:
            data = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); restore or remove it"
            ) from error
        return {"text": not_empty(decoded(data, path), path), "source": path}


@dataclass(frozen=True)
class Lines(Reopened):
    """JSON Lines files: `source[i]` is the object of a line, with `source`, FILE:LINE.

    Blank lines are left out. Lines are found once and read as they are asked for.

    Raises:
      InputError: no such file, or a line that is no JSON object in UTF-8.
    """

    paths: str | tuple[str, ...]

    @functools.cached_property
    def _lines(self) -> list[tuple[str, int, int]]:
        """(file, number from 1, where it begins) of each line."""
        found = []
        for path in files(self.paths):
            with open(path, "rb") as file:
                place = 0
                for number, line in enumerate(file, 1):
                    if line.strip():
                        found.append((path, number, place))
                    place += len(line)
        return found

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        path, number, place = self._lines[index]
        where = f"{path}:{number}"
        with open(path, "rb") as file:
            file.seek(place)
            text = decoded(file.readline(), where)
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: is not JSON ({error}); correct the line") from error
        if not isinstance(record, dict):
            raise InputError(f"{where}: a line is a JSON object, not {type(record).__name__}")
        return {**record, "source": where}


@dataclass(frozen=True)
class JsonLines(Lines):
    """JSON Lines of documents: the `field` of each line is its text.

    Raises:
      InputError: as `Lines`, or a line without such a text.
    """

    field: str = "text"

    def __getitem__(self, index: int) -> Record:
        record = super().__getitem__(index)
        where = record["source"]
        if self.field not in record:
            has = ", ".join(name for name in record if name != "source") or "none"
            raise InputError(f"{where}: has no field {self.field!r} but {has}; name the field")
        return {"text": not_empty(record[self.field], where), "source": where}


def decoded(data: bytes, where: str) -> str:
    """UTF-8 as text, or InputError with the place of the first byte that is none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {error.start} is not UTF-8; convert the text (iconv -t UTF-8)"
        ) from error


def not_empty(text: Any, where: str) -> str:
    """A text with something in it, or InputError."""
    if not isinstance(text, str):
        raise InputError(f"{where}: a text is a string, not {type(text).__name__}")
    if not text.strip():
        raise InputError(f"{where}: the document is empty; leave it out")
    return text
