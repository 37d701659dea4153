"""Statistics of real pictures in a file, which says whose they are."""

import dataclasses
import os
import zipfile

import numpy as np

from jaxformer.distances import Statistics
from jaxformer.errors import InputError


def save(path: str | os.PathLike, found: Statistics) -> None:
    """Writes statistics as an npz of their fields and their hash.

    Example:
      >>> import tempfile
      >>> from jaxformer.distances import statistics
      >>> found = statistics(np.eye(3), "a judge", (8, 8))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder + "/a.npz", found)
      ...     load(folder + "/a.npz").digest == found.digest
      True
    """
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    with open(path, "wb") as file:  # Or NumPy would add its own ending to the name.
        np.savez(file, digest=found.digest, **fields)


def load(path: str | os.PathLike) -> Statistics:
    """Reads what `save` wrote.

    Raises:
      InputError: no such file, statistics that do not say whose they are, as others write
        them, or numbers that are not those of the file's hash.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{os.fspath(path)}: holds no statistics ({error})") from None
    wanted = {f.name for f in dataclasses.fields(Statistics)} | {"digest"}
    if held.keys() != wanted:
        raise InputError(
            f"{os.fspath(path)}: holds {', '.join(sorted(held)) or 'nothing'}, where "
            f"statistics have {', '.join(sorted(wanted))}; write them with "
            "python -m evaluate.reference"
        )
    mean, covariance = held["mean"], held["covariance"]
    size, count = tuple(held["size"].tolist()), int(held["count"])
    found = Statistics(mean, covariance, count, str(held["encoder"]), size)
    if found.digest != str(held["digest"]):
        raise InputError(
            f"{os.fspath(path)}: its numbers are not those of its hash {held['digest']}; write "
            "it again"
        )
    return found
