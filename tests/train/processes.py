"""Runs of the program in several processes on one machine, for tests."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 2  # of each process.


@contextlib.contextmanager
def started(
    workdir: pathlib.Path,
    count: int,
    *argv: str,
    each: dict[int, tuple[str, ...]] | None = None,
):
    """`count` processes of `python -m train`; `each` adds arguments to some. Ends them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES} "
        "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": "",
    }
    processes = []
    try:
        for i in range(count):
            meet = ("--coordinator", f"127.0.0.1:{port}", "--processes", str(count))
            meet = (*meet, "--process", str(i)) if count > 1 else ()
            command = [sys.executable, "-m", "train", *argv, *(each or {}).get(i, ()), *meet]
            processes.append(
                subprocess.Popen(
                    [*command, "--workdir", str(workdir)],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def ended(processes, seconds: float) -> list[tuple[int, str]]:
    """Exit status and output of each process."""
    outputs = [p.communicate(timeout=seconds)[0] for p in processes]
    return [(p.returncode, out) for p, out in zip(processes, outputs, strict=True)]
