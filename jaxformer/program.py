"""What every program does alike: one sentence where input is bad, and results in a file."""

import contextlib
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jaxformer.errors import InputError


def entry(main: Callable[..., int]) -> Callable[..., int]:
    """A program's `main` that tells bad input in one sentence and returns status 2 for it."""

    @functools.wraps(main)
    def told(*args, **options) -> int:
        try:
            return main(*args, **options)
        except InputError as error:
            tell(error)
            return 2

    return told


def tell(error: object) -> None:
    """Says on standard error why a program ends: one write, that no thread's comes between."""
    sys.stderr.write(f"error: {error}\n")


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Where a file cannot be written, that is bad input.

    Raises:
      InputError: names the file and why.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{error}; name another place to write to") from error


def write_json(path: str | pathlib.Path, found: Any, indent: int = 2) -> None:
    """Writes results, and the folders above them.

    Raises:
      InputError: they cannot be written there.
    """
    path = pathlib.Path(path)
    with writing():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=indent) + "\n")
