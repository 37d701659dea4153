"""Checkpoints with a flipped bit, a file cut short or gone: each of them is found."""

import contextlib
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxformer import checkpoint
from jaxformer.data.loader import fingerprint, train_batches
from jaxformer.experiment import Experiment, describe, load
from train.begin import begin
from train.faults.processes import CONFIG, TINY
from train.faults.row import Row, wrongs
from train.run import prepare, train

FEW = (*TINY, "mesh=data=1", "steps=4", "keep.every=2", "keep.best=0", "evals={}")
FLIPPED = "a bit of the arrays flipped"


def damaged(folder: pathlib.Path, flips: int = 40) -> Row:
    """Bits of a checkpoint's arrays flipped, one at a time; then each file cut, then deleted.

    What is found sends the run back to the checkpoint before. What is not found, two files in
    which Orbax says that it wrote the others, must not matter: what is restored is bitwise
    what was saved.
    """
    experiment = load(CONFIG, FEW)
    train(experiment, folder / "run", devices=jax.devices()[:1])
    restart = _restart(experiment)
    true = checkpoint.digest(restart(folder / "run" / "checkpoints")[0])
    draw = random.Random(0)
    last = folder / "run" / "checkpoints" / "4"
    files = sorted(p.relative_to(last) for p in last.rglob("*") if p.is_file())
    arrays = [p for p in files if "state" in p.parts and p.parent.name == "d"]
    others = [p for p in files if p not in arrays]
    sizes = [(last / p).stat().st_size for p in arrays]
    kinds: dict[str, list[tuple[pathlib.Path, Callable[[pathlib.Path], None]]]] = {
        FLIPPED: [(p, _flip(draw)) for p in draw.choices(arrays, sizes, k=flips)],
        "a bit of each other file flipped": [(p, _flip(draw)) for p in others],
        "a file cut in half": [(p, _cut) for p in files],
        "a file deleted": [(p, pathlib.Path.unlink) for p in files],
    }
    found, harmless, silent = {}, {}, []
    for kind, damages in kinds.items():
        found[kind] = harmless[kind] = 0
        for path, damage in damages:
            with _copied(folder) as copy:
                damage(copy / "4" / path)
                state, step = restart(copy)
                same = checkpoint.digest(state) == true
            found[kind] += step == 2
            harmless[kind] += step == 4 and same
            silent += [f"{kind}: {path}"] if step == 4 and not same else []
    told = (
        f"{kind}: {found[kind]} of {len(damages)} found"
        + (f", {harmless[kind]} change nothing that is read" if harmless[kind] else "")
        for kind, damages in kinds.items()
    )
    return Row(
        "a checkpoint damaged",
        "; ".join(told) + "; the one before is taken each time",
        (*silent, *wrongs(every_flip_is_found=found[FLIPPED] == flips)),
        {kind: {"tried": len(kinds[kind]), "found": found[kind]} for kind in kinds},
    )


def _restart(experiment: Experiment) -> Callable[[pathlib.Path], tuple[Any, int]]:
    """What a run does first: from a folder of checkpoints, the state and its step."""
    made = prepare(experiment, jax.devices()[:1])
    size, seed = experiment.batch_size, experiment.seed
    described = describe(experiment)
    described |= {"stream": fingerprint(experiment.data, size, seed)}

    def restart(folder: pathlib.Path) -> tuple[Any, int]:
        with contextlib.closing(
            train_batches(experiment.data, batch_size=size, seed=seed)
        ) as data:
            state, _, step = begin(experiment, made, folder, described, data, say=_nothing)
        return state, step

    return restart


@contextlib.contextmanager
def _copied(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    copy = folder / "copy"
    shutil.copytree(folder / "run" / "checkpoints", copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


def _flip(draw: random.Random) -> Callable[[pathlib.Path], None]:
    def flip(path: pathlib.Path) -> None:
        data = bytearray(path.read_bytes())
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)

    return flip


def _cut(path: pathlib.Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _nothing(text: str) -> None:
    """Says nothing."""
