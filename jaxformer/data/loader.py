"""From a source to batches on a mesh: order, workers, exact resume, exact evaluation.

Global batch n is a function of (pipeline, batch_size, seed, n). Each process makes its
rows of it, and the rows of all processes, in order, are the rows that one process alone
would make: records, order and augmentation do not depend on how many processes or
workers there are. Only what a batch transform does across rows can (see `Mixup`).
"""

import functools
import hashlib
import inspect
import json
import multiprocessing.util
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import absl.flags
import grain
import jax
import numpy as np

from jaxformer.data.sources import Record
from jaxformer.errors import InputError

Batch = dict[str, np.ndarray]

_AHEAD = 2  # batches made ahead of the step, each by a thread of its own.


@dataclass(frozen=True)
class Pipeline:
    """What the records are and what is done to them.

    `transforms` act on a record, called `(record)` or `(record, rng)`; `batch_transforms`
    act on this process's rows of a batch, called `(batch)` or `(batch, rng)`.
    `workers` processes make the batches, each one whole batches, so that memory holds
    about three batches a worker; 0 makes them in two threads of this process.
    Workers start by spawning: source and transforms must be picklable, and the program
    needs its `if __name__ == "__main__":`.
    """

    source: grain.sources.RandomAccessDataSource
    transforms: tuple = ()
    batch_transforms: tuple = ()
    workers: int = 0


def train_batches(
    pipeline: Pipeline,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """This process's rows of an endless, shuffled stream of batches of `batch_size`.

    Yields `{"image": float32 [b, Y, X, C], "label": int32 [b]}`, with whatever else the
    transforms add, for `b = batch_size // process_count`. Every epoch has every record
    once, in an order of its own; a batch may hold the end of one and the start of the
    next. `get_state()` is `{"step": n}`, the number of the next batch, and `set_state`
    resumes there exactly, whatever was made ahead and with any number of workers.
    `close()` ends the workers.

    `process_index` counts processes that read different rows: where several processes
    share one slice of the batch (a tensor axis across hosts), give them the same one.

    Raises:
      InputError: `process_count` does not divide `batch_size`, the source is empty, or,
        from the iterator, what a source or transform raised, unchanged.
    """
    rows = _rows(pipeline, batch_size, process_index, process_count)
    if seed < 0:
        raise InputError(f"seed={seed} must not be negative; give 0 or more")
    # Grain shuffles epoch e with seed + e: hashed first, or seed 1 would be seed 0 late.
    order, draw, mix = map(int, np.random.SeedSequence(seed).generate_state(3))
    augment = functools.partial(_apply, _with_arity(pipeline.transforms))
    across = functools.partial(_apply, _with_arity(pipeline.batch_transforms))
    batches = (
        grain.MapDataset.source(pipeline.source)
        .shuffle(order)
        .repeat()
        .random_map(augment, seed=draw)  # before any slice: by the global index.
        .batch(rows, drop_remainder=True, batch_fn=_collate)
        .slice(slice(process_index, None, process_count))
        .random_map(across, seed=mix)  # after it: by the step, alike everywhere.
    )
    return _Batches(batches, pipeline.workers)


def eval_batches(
    pipeline: Pipeline,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's rows of each record once, in order, in batches of one shape.

    Yields batches as `train_batches` does, with `"weight"` float32 `[b]`: 1 for a
    record, 0 for the zeros that fill up the last batch. Every process yields the same
    number of batches.

    Raises:
      InputError: as `train_batches`, or the pipeline has a random transform.
    """
    rows = _rows(pipeline, batch_size, process_index, process_count)
    transforms = _with_arity(pipeline.transforms)
    drawn = [t for t, is_random in transforms if is_random]
    drawn += pipeline.batch_transforms
    if drawn:
        raise InputError(
            f"evaluation has no random or batch transforms, but this has {drawn[0]}; "
            "take it out of the evaluation's pipeline"
        )
    padded = -(-len(pipeline.source) // batch_size) * batch_size
    batches = (
        grain.MapDataset.source(_Padded(pipeline.source, padded))
        .map(functools.partial(_apply, (*transforms, (_blank, False)), rng=None))
        .batch(rows, drop_remainder=True, batch_fn=_collate)
        .slice(slice(process_index, None, process_count))
    )
    return _until_done(_Batches(batches, pipeline.workers))


def to_mesh(batch: Batch, sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Joins every process's rows to global arrays, split along the leading axis."""
    join = jax.make_array_from_process_local_data
    return {name: join(sharding, rows) for name, rows in batch.items()}


def fingerprint(pipeline: Pipeline, batch_size: int, seed: int) -> str:
    """A hash of all that decides the stream, to compare when a run resumes.

    It covers the source's type, fields as given (a relative path stays one) and length,
    the transforms and their numbers, `batch_size` and `seed`; not the workers and not
    the processes, which change nothing. Unseen go new bytes under an old file name and new
    code under an old name of a function or class.
    """
    stream = [
        _describe(pipeline.source),
        len(pipeline.source),
        _describe(pipeline.transforms),
        _describe(pipeline.batch_transforms),
        batch_size,
        seed,
    ]
    return hashlib.sha256(json.dumps(stream).encode()).hexdigest()[:16]


def _describe(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 5.0 and 5 draw the same stream.
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (tuple, list)):
        return [_describe(item) for item in value]
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if not is_dataclass(value):
        return str(value) if isinstance(value, os.PathLike) else name
    return [name, {f.name: _describe(getattr(value, f.name)) for f in fields(value)}]


def _rows(pipeline: Pipeline, batch_size: int, index: int, count: int) -> int:
    """The rows of a batch that process `index` of `count` makes."""
    if not len(pipeline.source):
        raise InputError(f"{pipeline.source}: holds no record; add some files")
    if batch_size < 1 or batch_size % count:
        raise InputError(
            f"batch_size={batch_size} must be a positive multiple of the "
            f"{count} processes; change it"
        )
    if not 0 <= index < count:
        raise InputError(f"process_index={index} must be from 0 to {count - 1}; count from 0")
    return batch_size // count


def _with_arity(transforms: Sequence[Callable]) -> tuple[tuple[Callable, bool], ...]:
    """Pairs each transform with whether it takes a generator."""
    return tuple((t, len(inspect.signature(t).parameters) == 2) for t in transforms)


def _apply(transforms, value, rng):
    for transform, is_random in transforms:
        value = transform(value, rng) if is_random else transform(value)
    return value


def _collate(records: Sequence[Record]) -> Batch:
    """Stacks records, integers as int32, and leaves out what names them."""
    first = records[0]
    for record in records:
        if "image" in first:
            _check_image(record, first)
    batch = {}
    for name in first:
        if name != "source":
            if isinstance(first[name], str):
                raise InputError(
                    f"{first.get('source', 'a record')}: {name!r} is text; put a transform "
                    "that makes tokens of it, such as Spell, among the transforms"
                )
            rows = np.stack([record[name] for record in records])
            batch[name] = rows.astype(np.int32) if rows.dtype == np.int64 else rows
    return batch


def _check_image(record: Record, first: Record) -> None:
    image, name = record["image"], record.get("source", "image")
    if isinstance(image, bytes) or image.dtype != np.float32:
        kind = "encoded" if isinstance(image, bytes) else image.dtype
        raise InputError(
            f"{name}: a batch holds float32 images, this one is {kind}; begin the "
            "transforms with Decode() and end them with Normalize()"
        )
    if image.shape != first["image"].shape:
        raise InputError(
            f"{name}: its shape {list(image.shape)} is not that of "
            f"{first.get('source', 'the first')}, {list(first['image'].shape)}; "
            "put Resize and CenterCrop, or RandomResizedCrop, among the transforms"
        )


@dataclass(frozen=True)
class _Padded:
    """A source filled up to `length` with its first record, at weight 0."""

    source: grain.sources.RandomAccessDataSource
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        real = index < len(self.source)
        return {**self.source[index if real else 0], "weight": np.float32(real)}


def _blank(record: Record) -> Record:
    """Makes padding zeros, now that the transforms have given it its shape."""
    if record["weight"]:
        return record
    return {name: np.zeros_like(value) for name, value in record.items()}


class _Batches(grain.DatasetIterator):
    """Batches from number `step` on; the state is that number and nothing else.

    Reading begins anew at `step`, so what was made ahead needs no place in the state.
    """

    def __init__(self, batches: grain.MapDataset, workers: int):
        super().__init__()
        self._batches, self._workers = batches, workers
        self._step = 0
        self._open: grain.DatasetIterator | None = None
        # At exit Grain (priority 1) ends its workers under the feet of its threads, and
        # may hang: end all of it before, in order.
        stop = weakref.WeakMethod(self._stop)
        multiprocessing.util.Finalize(self, _call_if_alive, (stop,), exitpriority=9)

    def _ahead(self) -> grain.DatasetIterator:
        self._assert_not_closed()
        if self._open is None:
            self._open = _read_ahead(self._batches, self._step, self._workers)
        return self._open

    def start_prefetch(self) -> None:
        self._ahead().start_prefetch()

    def __next__(self) -> Batch:
        try:
            batch = next(self._ahead())
        except StopIteration:
            raise
        except Exception:
            self._stop()  # Another call tries this step again.
            raise
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._step = int(state["step"])

    def close(self) -> None:
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def _call_if_alive(method: weakref.WeakMethod) -> None:
    if (call := method()) is not None:
        call()


def _read_ahead(batches: grain.MapDataset, step: int, workers: int):
    threads = 1 if workers else _AHEAD
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    ahead = batches.slice(slice(step, None)).to_iter_dataset(options)
    if workers:
        # Grain asks absl for its flags, which only absl's own programs have parsed.
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()
        ahead = ahead.mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(num_workers=workers),
            worker_init_fn=_end_with_parent,
        )
    return iter(ahead)


def _end_with_parent(index: int, count: int) -> None:
    """Ends this worker when its parent is gone, killed or not: Grain's would live on."""

    parent = multiprocessing.parent_process()

    def wait():
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _until_done(batches: _Batches) -> Iterator[Batch]:
    try:
        yield from batches
    finally:
        batches.close()
