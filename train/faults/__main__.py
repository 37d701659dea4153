"""`python -m train.faults [--rows kill,disk] [--json FILE]`: what a run makes of faults.

Each row is a run, or several, on this machine's CPU, to which something is done. The exit
status is 1 where one of them shows what it should not.
"""

import argparse
import functools
import logging
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

# Faults are the same on any device; 8 of them stand for a pod.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

from jaxformer.errors import InputError
from jaxformer.program import entry, write_json
from train.faults import damage, disk, elastic, evaluation, kill, memory, meshes, signals
from train.faults.row import Row
from train.plan import versions

ROWS = {
    "kill": kill.killed,
    "sigterm": functools.partial(signals.asked, count=1),
    "sigterm2": functools.partial(signals.asked, count=2),
    "lost": signals.lost,
    "frozen": signals.frozen,
    "damage": damage.damaged,
    "disk": disk.full,
    "records": lambda folder: elastic.records_once(),
    "hosts": elastic.same_losses,
    "evaluate": evaluation.on_processes,
    "meshes": lambda folder: meshes.same_losses(),
    "memory": lambda folder: memory.beside_truth(),
}


@entry
def main(argv: list[str] | None = None) -> int:
    """Makes the table; returns the exit status: 0 all is well, 1 it is not, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m train.faults",
        description="Does to small runs what happens to great ones, and tells what is seen.",
    )
    parser.add_argument("--rows", help=f"some of {','.join(ROWS)}; default: all")
    parser.add_argument("--json", help="a file for all of it")
    args = parser.parse_args(argv)
    wanted = args.rows.split(",") if args.rows else list(ROWS)
    for name in wanted:
        if name not in ROWS:
            raise InputError(f"--rows: there is no row {name!r}; choose from {', '.join(ROWS)}")
    jax.config.update("jax_num_cpu_devices", 8)
    for name, level in (("absl", logging.ERROR), ("asyncio", logging.CRITICAL)):
        logging.getLogger(name).setLevel(level)  # Orbax tells of files that we damaged.
    rows = []
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            begun, spent = time.monotonic(), cpu_seconds()
            place = pathlib.Path(folder) / name
            place.mkdir()
            try:
                row = ROWS[name](place)
            except (RuntimeError, subprocess.SubprocessError) as error:  # The others go on.
                row = Row(name, f"not shown: {str(error)[:300]}", ("it came to its end",))
            seconds, spent = time.monotonic() - begun, cpu_seconds() - spent
        print(f"{'no' if row.wrong else 'ok'}  {row.fault}: {row.shown} ({seconds:.0f} s)")
        for wrong in row.wrong:
            print(f"    not so: {wrong}")
        sys.stdout.flush()
        rows.append(vars(row) | {"row": name, "seconds": seconds, "cpu_seconds": spent})
    print("\n| fault or change | shown |\n|---|---|")
    for row in rows:
        print(f"| {row['fault']} | {row['shown']} |")
    whole, spent = (sum(row[name] for row in rows) for name in ("seconds", "cpu_seconds"))
    print(f"\n{whole / 60:.1f} minutes, {spent / 60:.1f} of a core")
    if args.json:
        about = {"versions": versions(), "cores": os.cpu_count(), "seconds": whole}
        write_json(args.json, about | {"cpu_seconds": spent, "rows": rows})
    return 1 if any(row["wrong"] for row in rows) else 0


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in used)


if __name__ == "__main__":
    sys.exit(main())
