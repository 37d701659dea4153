"""Checkpoints: Orbax writes them, and a digest of every leaf proves them on the way back.

Orbax gives the asynchronous, atomic, sharded save. It does not notice a flipped bit in
array data, so each leaf has a digest here, computed where the leaf lies: the same number
on any mesh, and certain to change when one element does. A list of the files, with their
sizes and digests, is written last: it also proves the bytes that a restore does not read.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree, UInt32

from jaxformer.errors import InputError
from jaxformer.sharding import path_name


class Damaged(InputError):
    """A checkpoint that is not what was saved; another may be whole."""


# Items of one checkpoint: arrays, data iterator, experiment, digests.
_ITEMS = ("state", "data", "experiment", "digests")
_FILES = "files.json"  # The list of the others.
_ONWARD = "onward.json"  # Where the data goes on, if not where it stood; see `go_on`.
_WHOLE = 64 << 20  # Bytes up to which a file has a digest: greater ones are leaves, which have.


def open_manager(
    directory: str | pathlib.Path,
    *,
    last: int = 2,
    best: int = 1,
    metric: str | None = None,
) -> ocp.CheckpointManager:
    """Opens a directory of checkpoints for writing, one folder a step.

    Args:
      directory: made where it does not exist.
      last: how many of the newest stay.
      best: how many of the best by `metric` stay, beside them.
      metric: a name in the metrics that `save` is given; the greatest is the best, or
        the smallest where a minus stands before the name.
    """
    root = pathlib.Path(directory).absolute()

    def finish() -> None:  # One process calls it: all is written, and has no name yet.
        (folder,) = root.glob("*.orbax-checkpoint-tmp")
        _list_files(folder)

    preservation = ocp.checkpoint_managers.preservation_policy
    policies: list[Any] = [preservation.LatestN(last)]
    score: Callable[[dict[str, float]], float] | None = None
    if metric is not None and best:
        name, sign = metric.removeprefix("-"), -1.0 if metric.startswith("-") else 1.0

        def scored(metrics: dict[str, float]) -> float:
            return sign * metrics[name] if name in metrics else float("-inf")

        score = scored
        policies.append(
            preservation.BestN(
                get_metric_fn=scored, n=best, keep_checkpoints_without_metrics=False
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation.AnyPreservationPolicy(policies),
        best_fn=score,  # Else Orbax does not write the metrics, and a restart forgets them.
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=finish),
    )
    try:
        return ocp.CheckpointManager(root, options=options, item_names=_ITEMS)
    except OSError as error:
        raise InputError(
            f"{directory}: checkpoints cannot be written there ({error.strerror}); choose "
            "another directory with --workdir"
        ) from error


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: PyTree,
    data: grain.DatasetIterator,
    experiment: dict[str, Any],
    metrics: dict[str, float] | None = None,
) -> None:
    """Begins to write a checkpoint and returns while the disk works.

    Args:
      manager: see `open_manager`. `manager.wait_until_finished()` waits for the disk.
      step: its number.
      state: arrays, wherever they lie. They may be donated once this returns.
      data: the data iterator; its position is saved.
      experiment: a description that the run must match to be resumed.
      metrics: what the best is chosen by.
    """
    proof = {
        "state": digest(state),
        "data": _sha(data.get_state()),
        "experiment": _sha(experiment),
        "files": _FILES,
    }
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=grain.checkpoint.CheckpointSave(data),
        experiment=ocp.args.JsonSave(experiment),
        digests=ocp.args.JsonSave(proof),
    )
    manager.save(step, args=items, metrics=metrics or {}, force=True)


def steps(directory: str | pathlib.Path) -> list[int]:
    """The steps that `directory` holds whole checkpoints of, oldest first."""
    found = pathlib.Path(directory)
    if not found.is_dir():
        return []
    return sorted(int(p.name) for p in found.iterdir() if p.name.isdecimal())


def find(directory: str | pathlib.Path) -> pathlib.Path:
    """The folder of checkpoints in a run's directory, or that folder itself.

    Raises:
      InputError: there are no checkpoints.
    """
    directory = pathlib.Path(directory)
    for folder in (directory / "checkpoints", directory):
        if steps(folder):
            return folder
    raise InputError(
        f"{directory}: holds no checkpoint; name a directory that `python -m train` wrote, "
        "such as runs/vit_digits"
    )


def read_experiment(directory: str | pathlib.Path, step: int) -> dict[str, Any]:
    """The description that was saved with a checkpoint."""
    with _told(directory, step):
        folder = pathlib.Path(directory).absolute() / str(step)
        experiment = _read(folder / "experiment", ocp.JsonCheckpointHandler())
        proof = _read(folder / "digests", ocp.JsonCheckpointHandler())
        if proof["experiment"] != _sha(experiment):
            raise ValueError("the experiment's digest does not match")
        return experiment


def set_aside(directory: str | pathlib.Path, step: int) -> pathlib.Path:
    """Renames a checkpoint that serves no more: its number is free and its bytes stay."""
    folder = pathlib.Path(directory) / str(step)
    aside = folder.with_name(f"{step}.damaged")
    while aside.exists():
        aside = aside.with_name(aside.name + "_")
    return folder.rename(aside)


def go_on(directory: str | pathlib.Path, step: int, data: grain.DatasetIterator) -> None:
    """Notes in a checkpoint that a run goes on from it with the batches that `data` is at.

    `restore` then sets the data there and not where it stood, so that a run which left
    batches out leaves them out again. It goes with the checkpoint when that goes.
    """
    folder = pathlib.Path(directory) / str(step)
    state = data.get_state()
    fresh = folder / f"{_ONWARD}.new"
    fresh.write_text(json.dumps({"data": state, "digest": _sha(state)}))
    fresh.replace(folder / _ONWARD)


def restore(
    directory: str | pathlib.Path,
    step: int,
    target: PyTree,
    data: grain.DatasetIterator | None = None,
    *,
    part: bool = False,
) -> PyTree:
    """Reads a checkpoint onto any mesh and proves every leaf.

    Args:
      directory: the folder of checkpoints.
      step: which.
      target: the shapes, dtypes and shardings that are wanted.
      data: set to the saved position, or to that of `go_on`, where given.
      part: `target` may leave leaves of the checkpoint out; they are not read.

    Raises:
      InputError: the checkpoint is not of these shapes (every difference is listed) or
        cannot be read; Damaged where a file or a digest does not match.
    """
    with _told(directory, step):
        folder = pathlib.Path(directory).absolute() / str(step)
        proof = _read(folder / "digests", ocp.JsonCheckpointHandler())
        if "files" in proof or (folder / _FILES).exists():  # Older ones have no list.
            _check_files(folder)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            saved = reader.metadata(folder / "state").item_metadata.tree
            _match(saved, target, part, directory, step)
            places = ocp.checkpoint_utils.construct_restore_args(target)
            args = ocp.args.PyTreeRestore(target, places, partial_restore=part)
            state = reader.restore(folder / "state", args=args)
        found = digest(state)
        broken = [name for name in found if [*found[name]] != proof["state"].get(name)]
        if broken:
            raise ValueError(f"the digest of {', '.join(broken)} does not match")
        if data is not None:
            # One file a process, all alike: as many processes as there were may differ.
            states = sorted((folder / "data").glob("process_*-of-*.json"))
            if not states:
                raise ValueError("the data iterator's state is missing")
            data.set_state(json.loads(states[0].read_text()))
            if proof["data"] != _sha(data.get_state()):
                raise ValueError("the data iterator's digest does not match")
            if (folder / _ONWARD).exists():
                onward = json.loads((folder / _ONWARD).read_text())
                if onward["digest"] != _sha(onward["data"]):
                    raise ValueError(f"the digest of {_ONWARD} does not match")
                data.set_state(onward["data"])
        return state


def _list_files(folder: pathlib.Path) -> None:
    """Writes down what the files of a checkpoint are, but for those that its commit writes."""
    others = (_FILES, "_CHECKPOINT_METADATA")
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name not in others)
    files = {str(p.relative_to(folder)): _file(p) for p in sorted(paths)}
    (folder / _FILES).write_text(json.dumps({"files": files, "digest": _sha(files)}))


def _check_files(folder: pathlib.Path) -> None:
    """Raises ValueError where a file is not what it was, or FileNotFoundError."""
    found = json.loads((folder / _FILES).read_text())
    if found["digest"] != _sha(found["files"]):
        raise ValueError(f"the digest of {_FILES} does not match")
    broken = [name for name, file in found["files"].items() if _file(folder / name) != file]
    if broken:
        raise ValueError(f"{', '.join(broken)}: not the bytes that were written")


def _file(path: pathlib.Path) -> dict[str, Any]:
    """Its size and, if it is not great, SHA-256."""
    size = path.stat().st_size
    if size > _WHOLE:
        return {"size": size}
    return {"size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def digest(tree: PyTree) -> dict[str, tuple[int, int]]:
    """Two 32-bit sums a leaf over (index, bits) of its elements, computed where it lies.

    Each term is a bijection of the element's bits (the finaliser of MurmurHash3), so one
    changed element always changes the sums, and many do but once in 2^64. Addition does
    not care for order: the digest is the same on every mesh.
    """
    leaves = jax.tree.leaves_with_path(tree)
    # One program for all, alone on the devices: collectives of several programs at once
    # can wait for each other for ever on CPU devices that share few cores.
    jax.block_until_ready(tree)
    found = jax.device_get(_digests([leaf for _, leaf in leaves]))
    return {path_name(p): tuple(d.tolist()) for (p, _), d in zip(leaves, found, strict=True)}


@jax.jit
def _digests(leaves: list[Array]) -> list[UInt32[Array, "2"]]:
    return [_digest(leaf) for leaf in leaves]


def _digest(x: Array) -> UInt32[Array, "2"]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    width = x.dtype.itemsize
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(width, 4)}")
    words = words.astype(jnp.uint32)  # 64-bit elements have become pairs.
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index = index * jnp.uint32(size) + along
    terms = [_mix(words ^ _mix(index + jnp.uint32(seed))) for seed in (1, 0x9E3779B9)]
    return jnp.stack([term.sum(dtype=jnp.uint32) for term in terms])


def _mix(h):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return h ^ (h >> 16)


def _sha(value: Any) -> str:
    """Of the value as JSON, which is the same before it is saved and after."""
    value = value.decode() if isinstance(value, bytes) else value
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _match(saved, target, part, directory, step):
    """Raises InputError with every leaf whose shape or dtype is not the saved one."""

    def leaves(tree):
        found = jax.tree.leaves_with_path(tree)
        return {path_name(p): f"{x.dtype}{list(x.shape)}" for p, x in found}

    old, new = leaves(saved), leaves(target)
    lines = []
    for name in sorted({**old, **new}):
        if part and name not in new:
            continue
        if old.get(name) != new.get(name):
            lines += [f"- {name} {old[name]}"] if name in old else []
            lines += [f"+ {name} {new[name]}"] if name in new else []
    if lines:
        raise InputError(
            f"checkpoint {directory}/{step} does not fit this experiment; choose the config "
            "it was trained with (- in the checkpoint, + in the experiment):\n"
            + "\n".join(lines)
        )


def _read(path, handler, args=None):
    """Reads one item, named by its folder."""
    with ocp.Checkpointer(handler) as reader:
        return reader.restore(path, args=args or ocp.args.JsonRestore())


class _told:
    """Turns whatever the libraries below raise into a sentence that names the checkpoint."""

    def __init__(self, directory, step):
        self.directory, self.step = directory, step

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # What is no fault of the files is not blamed on them.
        innocent = (InputError, MemoryError, jax.errors.JaxRuntimeError)
        if error is None or isinstance(error, innocent) or not isinstance(error, Exception):
            return
        where = f"checkpoint {self.directory}/{self.step}"
        if isinstance(error, OSError) and not isinstance(
            error, FileNotFoundError | NotADirectoryError
        ):
            raise InputError(
                f"{where} cannot be read: {error}; try again when it can"
            ) from error
        earlier = [s for s in steps(self.directory) if s < self.step]
        remedy = f"go back to step {earlier[-1]}" if earlier else "start anew"
        reason = str(error).strip().split(". See full")[0].splitlines()
        reason = reason or [type(error).__name__]
        raise Damaged(
            f"{where} is damaged: {reason[0][:300]}; move that folder away to {remedy}"
        ) from error
