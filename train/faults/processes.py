"""Runs of the program in one or several processes on this machine, to be ended or not."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from jaxformer.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "vit_digits.py"
DEVICES = 2  # of each process.
# So small that a run takes seconds.
TINY = (
    "model.width=32", "model.depth=2", "model.mlp_dim=48", "batch_size=24", "steps=20",
    "eval_every=10", "keep.every=10", "log_every=1", "eval_batch_size=100", "ema=0.9",
    "data.batch_transforms=()", "model.pool=cls", "model.size=(8,8)", "model.channels=1",
)  # fmt: skip


@contextlib.contextmanager
def started(
    workdir: pathlib.Path,
    count: int,
    *argv: str,
    each: dict[int, tuple[str, ...]] | None = None,
    devices: int = DEVICES,
) -> Iterator[list[subprocess.Popen]]:
    """`count` processes of `python -m train`; `each` adds arguments to some. Ends them."""
    environment = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": "",
    }
    processes = []
    try:
        for meet, i in zip(meeting(count), range(count), strict=True):
            command = ("train", *argv, *(each or {}).get(i, ()), *meet)
            processes.append(begin((*command, "--workdir", str(workdir)), environment))
        yield processes
    finally:
        for process in processes:
            end(process)


def meeting(count: int) -> list[tuple[str, ...]]:
    """How each of `count` processes finds the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ("--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process")
    return [(*meet, str(i)) if count > 1 else () for i in range(count)]


def begin(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    """Starts `python -m` with a command on this machine's CPU, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen) -> None:
    """Kills it, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def ended(processes: Sequence[subprocess.Popen], seconds: float) -> list[tuple[int, str]]:
    """Exit status and output of each process; TimeoutExpired if one does not end."""
    outputs = [p.communicate(timeout=seconds)[0] for p in processes]
    return [(p.returncode, out) for p, out in zip(processes, outputs, strict=True)]


def wait_for(
    workdir: pathlib.Path,
    count: int,
    processes: Sequence[subprocess.Popen],
    seconds: float = 300,
) -> None:
    """Until a run has written so many rows.

    Raises:
      RuntimeError: a process ended before, with what it said; or the time is over.
    """
    limit = time.monotonic() + seconds
    while rows(workdir) < count:
        for process in processes:
            if process.poll() is not None:
                raise RuntimeError(f"a run ended on its own: {process.communicate()[0]}")
        if time.monotonic() > limit:
            raise RuntimeError(f"{workdir}: fewer than {count} rows after {seconds:.0f} s")
        time.sleep(0.002)


def rows(workdir: pathlib.Path) -> int:
    """How many rows a run has written."""
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """The loss of each step that a run has told of."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{workdir}: holds no metrics.jsonl; name a run's directory")
    found = map(json.loads, path.read_text().splitlines())
    return {row["step"]: row["loss"] for row in found if "loss" in row}
