"""`python -m evaluate.reference CONFIG.py TASK FILE.npz`: statistics of real pictures, once.

What the encoder of a task such as `evaluate.drawn.Drawn` sees of its `train`: mean and
covariance, how many there were, whose features they are and of what size of pictures, and a
hash. `tasks.TASK.reference=FILE.npz` then takes Frechet distances to them.
"""

import argparse
import logging
import sys

import jax

from evaluate.drawn import Drawn
from evaluate.encoder import Look
from jaxformer import distances
from jaxformer.data import statistics
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.program import entry, writing
from jaxformer.sharding import make_mesh


def reference(task: Drawn) -> distances.Statistics:
    """The statistics of a task's real pictures, on all devices."""
    task.encoder.check()
    look = Look(*task.encoder.load(make_mesh("", jax.devices())), task.features)
    real, _ = look.at(task.train)
    return distances.statistics(real, task.encoder.name, task.size)


@entry
def main(argv: list[str] | None = None) -> int:
    """Writes a file; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluate.reference",
        description="Writes the statistics of a task's real pictures, seen by its encoder.",
    )
    parser.add_argument("config", help="a config whose tasks judge drawn pictures")
    parser.add_argument("task", help="the name of such a task")
    parser.add_argument("file", help="where to write them, an npz")
    parser.add_argument("overrides", nargs="*", help="such as tasks.plain.encoder.path=DIR")
    args = parser.parse_intermixed_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells what it misses.
    tasks = load(args.config, args.overrides).tasks
    task = tasks.get(args.task)
    if not isinstance(task, Drawn):
        known = [name for name, one in tasks.items() if isinstance(one, Drawn)]
        raise InputError(
            f"{args.config}: has no task {args.task!r} that judges drawn pictures; it has "
            f"{', '.join(known) or 'none'}"
        )
    found = reference(task)
    with writing():
        statistics.save(args.file, found)
    print(f"{args.file}: {found.count} pictures seen by {found.encoder}, hash {found.digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
