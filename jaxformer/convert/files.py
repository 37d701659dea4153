"""Directories as Hugging Face saves them: `config.json` and safetensors, whole or sharded.

Those of diffusers name a `_class_name` in place of a `model_type`, and their files so.

Headers are checked by the safetensors library; bytes are then read from the offsets that it
has approved, a piece at a time, so that no file is ever in memory as a whole. Nothing is
unpickled, and the names of tensors are looked up in a table, never in a file system.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxformer.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DIFFUSERS = "diffusion_pytorch_"  # What diffusers puts before these.
SHARD_BYTES = 5 * 10**9
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a file: where it lies, and how to read some of its rows."""

    path: pathlib.Path
    shape: tuple[int, ...]
    dtype: Any
    start: int  # in the file, bytes.

    def read(self, rows: slice | None = None) -> np.ndarray:
        """The tensor, or `rows` of its first axis, as an array of its own."""
        shape, start = self.shape, self.start
        if rows is not None:
            size = math.prod(shape[1:]) * np.dtype(self.dtype).itemsize
            first, last, _ = rows.indices(shape[0])
            shape, start = (last - first, *shape[1:]), start + first * size
        count = math.prod(shape)
        found = np.fromfile(self.path, self.dtype, count, offset=start)
        if len(found) != count:
            raise InputError(f"{self.path}: became shorter while it was read; load it again")
        return found.reshape(shape)

    def split(self, count: int) -> list["Stored"]:
        """So many equal parts, one after the other, of its first two axes taken as one."""
        rows = self.shape[0] * self.shape[1] // count
        size = rows * math.prod(self.shape[2:]) * np.dtype(self.dtype).itemsize
        shape = (rows, *self.shape[2:])
        return [
            dataclasses.replace(self, shape=shape, start=self.start + i * size)
            for i in range(count)
        ]


@dataclasses.dataclass(frozen=True)
class Joined(Stored):
    """Several tensors one after the other, along their first axis, as one of another layout."""

    parts: tuple[Stored, ...] = ()

    def read(self, rows: slice | None = None) -> np.ndarray:
        """The whole, or `rows` of its first axis, of those parts alone that hold them."""
        first, last, _ = (slice(None) if rows is None else rows).indices(self.shape[0])
        found, start = [], 0
        for part in self.parts:
            low, high = (min(max(n - start, 0), part.shape[0]) for n in (first, last))
            if low < high:
                found.append(part.read(slice(low, high)))
            start += part.shape[0]
        return np.concatenate(found)


def join(*parts: Stored) -> Joined:
    """Tensors as one: those of a type, whose shapes differ in the first axis at most."""
    one = parts[0]
    shape = (sum(part.shape[0] for part in parts), *one.shape[1:])
    return Joined(one.path, shape, one.dtype, one.start, parts)


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """`config.json` of a directory.

    Raises:
      InputError: it is not there, or is no JSON object.
    """
    path = directory / "config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(
            f"{directory}: has no config.json; name a directory as Hugging Face saves it"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object; fetch it again")
    return found


def open_tensors(directory: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of a directory, by name; none is read yet.

    Raises:
      InputError: no safetensors, or a file that is truncated or lies about itself.
    """
    theirs = (directory / (DIFFUSERS + name) for name in (WEIGHTS, INDEX))
    before = DIFFUSERS if any(path.is_file() for path in theirs) else ""
    index = directory / (before + INDEX)
    if index.is_file():
        try:
            placed = json.loads(index.read_text())["weight_map"]
            names = sorted({str(name) for name in placed.values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index}: is no index of shards; fetch it again") from error
        for name in names:
            if pathlib.PurePath(name).name != name:
                raise InputError(
                    f"{index}: {name!r} lies outside of {directory}; it is refused"
                )
    elif (directory / (before + WEIGHTS)).is_file():
        placed, names = None, [before + WEIGHTS]
    else:
        pickled = sorted(p.name for p in directory.glob("*.bin"))
        remedy = "fetch it"
        if pickled:
            remedy = f"{pickled[0]} is a pickle, which is never read: write the model anew "
            remedy += "by transformers' save_pretrained"
        raise InputError(f"{directory}: has no {WEIGHTS} and no {INDEX}; {remedy}")
    found: dict[str, Stored] = {}
    for name in names:
        tensors = _open(directory / name)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise InputError(f"{directory / name}: {twice[0]} is in another shard too")
        found |= tensors
    if placed is not None and placed.keys() != found.keys():
        lost = sorted(placed.keys() ^ found.keys())
        raise InputError(
            f"{index}: {len(lost)} tensors are in the index alone or in the shards alone, "
            f"such as {lost[0]}; fetch all shards of one checkpoint"
        )
    return found


def library() -> Any:
    """The safetensors library, in an extra of its own.

    Raises:
      InputError: it is not installed.
    """
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise InputError(
            'files of the hub need safetensors; run pip install "jaxformer[hf]"'
        ) from None
    return safetensors


def _open(path: pathlib.Path) -> dict[str, Stored]:
    safetensors = library()
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = set(file.keys())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: is no whole safetensors file ({str(error).strip()}); fetch it again"
        ) from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    found = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            raise InputError(
                f"{path}: {name} is {entry['dtype']}; {', '.join(_DTYPES)} can be read"
            )
        start = 8 + size + entry["data_offsets"][0]
        found[name] = Stored(path, tuple(entry["shape"]), _DTYPES[entry["dtype"]], start)
    return found


def write(
    directory: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `config.json` and the tensors, in shards where they are more than one holds.

    What is there under these names is replaced only once all is written.
    """
    safetensors = library()
    directory.mkdir(parents=True, exist_ok=True)
    before = DIFFUSERS if "_class_name" in config else ""
    whole, index = directory / (before + WEIGHTS), directory / (before + INDEX)
    written: list[tuple[pathlib.Path, list[str], int]] = []
    shard: dict[str, np.ndarray] = {}

    def close_shard() -> None:
        path = directory / f".writing-{len(written)}.safetensors"
        safetensors.numpy.save_file(shard, path, metadata={"format": "pt"})
        written.append((path, list(shard), _bytes(shard)))
        shard.clear()

    try:
        for name, tensor in tensors:
            if shard and _bytes(shard) + tensor.nbytes > shard_bytes:
                close_shard()
            shard[name] = np.asarray(tensor, order="C")
        close_shard()
        count = len(written)
        if count == 1:
            written[0][0].replace(whole)
            index.unlink(missing_ok=True)
        else:
            placed = {}
            for i, (path, names, _) in enumerate(written):
                final = f"{before}model-{i + 1:05}-of-{count:05}.safetensors"
                path.replace(directory / final)
                placed |= dict.fromkeys(names, final)
            total = sum(size for _, _, size in written)
            told = {"metadata": {"total_size": total}, "weight_map": placed}
            index.write_text(json.dumps(told, indent=2) + "\n")
            whole.unlink(missing_ok=True)
        (directory / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    finally:
        for path in directory.glob(".writing-*.safetensors"):
            path.unlink()


def _bytes(tensors: Mapping[str, np.ndarray]) -> int:
    return sum(x.nbytes for x in tensors.values())
