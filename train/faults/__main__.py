"""`python -m train.faults [--rows kill,disk] [--together 2] [--json FILE]`: faults, in a table.

Each row is a run, or several, on this machine's CPU, to which something is done. The exit
status is 1 where one of them shows what it should not.
"""

import argparse
import concurrent.futures
import functools
import json
import logging
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

# Faults are the same on any device; 8 of them stand for a pod.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

from jaxformer.errors import InputError
from jaxformer.program import entry, write_json
from train.faults import damage, disk, elastic, evaluation, kill, memory, meshes, signals
from train.faults.processes import ROOT
from train.faults.row import Row
from train.plan import versions

ROWS = {  # Those that take longest first: the others fit beside and after them.
    "kill": kill.killed,
    "meshes": lambda folder: meshes.same_losses(),
    "hosts": elastic.same_losses,
    "lost": signals.lost,
    "frozen": signals.frozen,
    "late": signals.late,
    "sigterm": functools.partial(signals.asked, count=1),
    "sigterm2": functools.partial(signals.asked, count=2),
    "memory": lambda folder: memory.beside_truth(),
    "evaluate": evaluation.on_processes,
    "damage": damage.damaged,
    "disk": disk.full,
    "records": lambda folder: elastic.records_once(),
}


@entry
def main(argv: list[str] | None = None) -> int:
    """Makes the table; returns the exit status: 0 all is well, 1 it is not, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m train.faults",
        description="Does to small runs what happens to great ones, and tells what is seen.",
    )
    parser.add_argument("--rows", help=f"some of {','.join(ROWS)}; default: all")
    parser.add_argument(
        "--together", type=int, default=1, help="rows that are made at once; default: 1"
    )
    parser.add_argument("--kills", type=int, default=20, help="in the row kill; default: 20")
    parser.add_argument("--json", help="a file for all of it")
    args = parser.parse_args(argv)
    wanted = args.rows.split(",") if args.rows else list(ROWS)
    for name in wanted:
        if name not in ROWS:
            raise InputError(f"--rows: there is no row {name!r}; choose from {', '.join(ROWS)}")
    if args.together < 1:
        raise InputError(f"--together {args.together}: must be 1 or more; one a core is usual")
    if not 1 <= args.kills <= kill.MOST:
        raise InputError(f"--kills {args.kills}: must be from 1 to {kill.MOST}; 20 is usual")
    begun = time.monotonic()
    if args.together > 1 and len(wanted) > 1:
        with concurrent.futures.ThreadPoolExecutor(args.together) as pool:
            rows = list(pool.map(functools.partial(_apart, kills=args.kills), wanted))
    else:
        rows = [_made(name, args.kills) for name in wanted]
    print("\n| fault or change | shown | row |\n|---|---|---|")
    for row in rows:
        print(f"| {row['fault']} | {row['shown']} | `{row['row']}` |")
    seconds, spent = time.monotonic() - begun, sum(row["cpu_seconds"] for row in rows)
    print(f"\n{seconds / 60:.1f} minutes, {spent / 60:.1f} of a core")
    if args.json:
        about = {"versions": versions(), "cores": os.cpu_count(), "seconds": seconds}
        write_json(args.json, about | {"cpu_seconds": spent, "rows": rows})
    return 1 if any(row["wrong"] for row in rows) else 0


def _made(name: str, kills: int) -> dict[str, Any]:
    """A row by its name, with what it took; said when it is made."""
    jax.config.update("jax_num_cpu_devices", 8)
    for logger, level in (("absl", logging.ERROR), ("asyncio", logging.CRITICAL)):
        logging.getLogger(logger).setLevel(level)  # Orbax tells of files that we damaged.
    with tempfile.TemporaryDirectory() as folder:
        begun, spent = time.monotonic(), cpu_seconds()
        place = pathlib.Path(folder) / name
        place.mkdir()
        try:
            row = ROWS[name](place, kills) if name == "kill" else ROWS[name](place)
        except Exception as error:  # The others go on.
            row = _unseen(name, f"{type(error).__name__}: {error}")
        seconds, spent = time.monotonic() - begun, cpu_seconds() - spent
    return _said(vars(row) | {"row": name, "seconds": seconds, "cpu_seconds": spent})


def _apart(name: str, kills: int) -> dict[str, Any]:
    """A row that a process of its own makes."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "row.json"
        command = (sys.executable, "-m", "train.faults", "--rows", name)
        command += ("--kills", str(kills), "--json", str(out))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if out.exists():
            return _said(json.loads(out.read_text())["rows"][0])
    row = _unseen(name, f"status {done.returncode} of its process: {done.stderr[-300:]}")
    return _said(vars(row) | {"row": name, "seconds": 0.0, "cpu_seconds": 0.0})


def _unseen(name: str, why: str) -> Row:
    return Row(name, f"not shown: {' '.join(why.split())[:300]}", ("it came to its end",))


def _said(row: dict[str, Any]) -> dict[str, Any]:
    print(
        f"{'no' if row['wrong'] else 'ok'}  {row['fault']}: {row['shown']} "
        f"({row['seconds']:.0f} s, {row['cpu_seconds']:.0f} of a core)",
        *(f"    not so: {wrong}" for wrong in row["wrong"]),
        sep="\n",
        flush=True,
    )
    return row


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in used)


if __name__ == "__main__":
    sys.exit(main())
