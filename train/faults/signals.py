"""Processes of one run that are asked to end, killed, or stopped whole."""

import os
import pathlib
import signal
import time

from jaxformer import checkpoint
from train import pace
from train.faults.processes import CONFIG, TINY, ended, losses, rows, started, wait_for
from train.faults.row import Row, wrongs

SMALL = (str(CONFIG), *TINY, "eval_every=1000", "steps=1000")
MESH = {1: "mesh=data=2", 2: "mesh=data=2,fsdp=2"}
MINUTE = 60.0  # in which the others of one that is lost are to end.


def asked(workdir: pathlib.Path, count: int, *overrides: str) -> Row:
    """SIGTERM to the last of `count` processes: all save at one step, and end well."""
    with started(
        workdir, count, *SMALL, MESH[count], "keep.every=500", *overrides
    ) as processes:
        wait_for(workdir, 3, processes)
        begun = time.monotonic()
        os.kill(processes[-1].pid, signal.SIGTERM)
        found = ended(processes, MINUTE)
        seconds = time.monotonic() - begun
    saved = checkpoint.steps(workdir / "checkpoints")
    statuses = [status for status, _ in found]
    step = saved[-1] if saved else None
    one = "the process" if count == 1 else f"one of {count} processes"
    return Row(
        f"SIGTERM to {one}",
        f"step {step} saved{' by all' if count > 1 else ''}, exit status "
        f"{' and '.join(map(str, statuses))} after {seconds:.1f} s",
        wrongs(
            every_status_is_0=statuses == [0] * count,
            one_step_is_saved=len(saved) == 1,
            it_is_said=f"asked to end: step {step} is saved" in found[0][1],
        ),
        {"processes": count, "step": step, "statuses": statuses, "seconds": seconds},
    )


def lost(workdir: pathlib.Path) -> Row:
    """One of two is killed: the other ends, and both go on from the last checkpoint."""
    argv = (*SMALL, MESH[2], "keep.every=5")
    with started(workdir, 2, *argv) as processes:
        wait_for(workdir, 12, processes)
        os.kill(processes[1].pid, signal.SIGKILL)
        begun = time.monotonic()
        (status, out), _ = ended(processes, 3 * MINUTE)
        seconds = time.monotonic() - begun
    taken = max(losses(workdir))
    saved = checkpoint.steps(workdir / "checkpoints")[-1]
    with started(workdir, 2, *argv, f"steps={saved + 2}") as processes:
        again = ended(processes, 3 * MINUTE)
    steps = sorted(losses(workdir))
    return Row(
        "kill -9 to one of two processes",
        f"the other ends after {seconds:.1f} s with status {status}; started again, both go "
        f"on from step {saved}, the last saved of {taken}",
        wrongs(
            it_ends_in_a_minute=seconds <= MINUTE,
            its_status_is_of_a_fault=status not in (0, 2),
            it_says_why=_sentence(out),
            the_last_save_is_near=taken - saved <= 10,
            both_go_on=[status for status, _ in again] == [0, 0]
            and f"resuming at step {saved}" in again[0][1],
            no_step_is_missing=steps == list(range(1, saved + 3)),
        ),
        {"seconds": seconds, "status": status, "saved": saved, "taken": taken},
    )


def frozen(workdir: pathlib.Path) -> Row:
    """One of two is stopped whole: it gives no sign of life, which JAX sees."""
    with started(workdir, 2, *SMALL, MESH[2]) as processes:
        wait_for(workdir, 3, processes)
        os.kill(processes[1].pid, signal.SIGSTOP)
        begun = time.monotonic()
        ((status, out),) = ended(processes[:1], 3 * MINUTE)
        seconds = time.monotonic() - begun
    return Row(
        "kill -STOP to one of two processes",
        f"the other ends after {seconds:.1f} s with status {status}",
        wrongs(
            it_ends_in_a_minute=seconds <= MINUTE,
            its_status_is_of_a_fault=status not in (0, 2),
            it_says_why=_sentence(out),
        ),
        {"seconds": seconds, "status": status},
    )


def late(workdir: pathlib.Path, seconds: float = 6.0) -> Row:
    """One of two stands still for a while and goes on: it is the one that is named."""
    with started(workdir, 2, *SMALL, MESH[2], "keep.every=500") as processes:
        wait_for(workdir, 15, processes)
        os.kill(processes[1].pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(processes[1].pid, signal.SIGCONT)
        wait_for(workdir, rows(workdir) + 3, processes)
        os.kill(processes[1].pid, signal.SIGTERM)
        found = ended(processes, MINUTE)
    slowest = max(pace.rows(workdir), key=lambda row: row["seconds"], default={"step": None})
    told = [row for row in pace.rows(workdir) if row["step"] == slowest["step"]]
    names = [f"process {row['process']}" for row in told if pace.is_late(row)]
    said = [f"step {slowest['step']} took " in out and " late" in out for _, out in found]
    seen = f"that took {slowest['seconds']:.1f} s" if told else "that nobody saw"
    return Row(
        f"`kill -STOP` to one of two processes, and after {seconds:.0f} s `kill -CONT`",
        f"{' and '.join(names) or 'nobody'} is named, with its host, for a step {seen}",
        wrongs(
            it_alone_is_named=names == ["process 1"],
            it_is_said=any(said),
            the_report_names_it=any("process 1" in line for line in pace.slow(workdir)),
            the_run_goes_on=[status for status, _ in found] == [0, 0],
        ),
        {"rows": told, "report": pace.slow(workdir)},
    )


def _sentence(out: str) -> bool:
    """Whether a process said that it lost another: by our words, or by those of JAX."""
    return "lost another one" in out or "heartbeat" in out.lower()
