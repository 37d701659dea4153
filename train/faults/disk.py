"""A disk that is full before a checkpoint is whole."""

import contextlib
import pathlib
import subprocess
import time
from collections.abc import Iterator

from jaxformer import checkpoint
from train.faults.processes import ended, losses, started, wait_for
from train.faults.row import Row, wrongs
from train.faults.signals import MESH, SMALL

SIZE = "24m"


def full(folder: pathlib.Path) -> Row:
    """A run whose disk is filled between two saves, and started again when there is room."""
    fault = f"the disk, a tmpfs of {SIZE}, full during a save"
    workdir, ballast = folder / "disk" / "run", folder / "disk" / "ballast"
    argv = (*SMALL, MESH[1], "keep.every=5")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_mounted(folder / "disk"))
        except (OSError, subprocess.CalledProcessError):
            return Row(fault, "not shown: no tmpfs can be mounted here, which takes root")
        with started(workdir, 1, *argv) as processes:
            wait_for(workdir, 12, processes)
            _wait_for_a_checkpoint(workdir)
            _fill(ballast)
            ((status, out),) = ended(processes, 120)
        told = [line for line in out.splitlines() if line.startswith("error: ")]
        saved = checkpoint.steps(workdir / "checkpoints")
        ballast.unlink()
        with started(workdir, 1, *argv, f"steps={saved[-1] + 7}") as processes:
            ((again, words),) = ended(processes, 120)
        steps = sorted(losses(workdir))
    return Row(
        fault,
        f"the run ends with status {status} and a sentence; with room again it goes on from "
        f"step {saved[-1]}, the last that is whole",
        wrongs(
            it_ends_as_a_fault=status == 1,
            it_says_so_in_one_sentence=len(told) == 1 and "make room there" in told[0],
            it_goes_on=again == 0 and f"resuming at step {saved[-1]}" in words,
            no_step_is_missing=steps == list(range(1, saved[-1] + 8)),
        ),
        {"status": status, "saved": saved[-1], "sentence": "".join(told)},
    )


@contextlib.contextmanager
def _mounted(folder: pathlib.Path) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _wait_for_a_checkpoint(workdir: pathlib.Path) -> None:
    limit = time.monotonic() + 60
    while not checkpoint.steps(workdir / "checkpoints") and time.monotonic() < limit:
        time.sleep(0.01)


def _fill(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
