"""Two processes on one machine: one run, whatever happens to one of them."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxformer import checkpoint
from tests.train.processes import DEVICES, ROOT, ended, started
from tests.train.test_train import CONFIG, TINY, losses, rows, run
from train.watch import STUCK

SMALL = (str(CONFIG), *TINY, "mesh=data=2,fsdp=2", "eval_every=1000", "steps=1000")
LENGTH = 60  # steps of the run that comes to its end.


def wait_for(workdir, step, processes, seconds=120):
    """Until a run has taken so many steps."""
    path, end = workdir / "metrics.jsonl", time.monotonic() + seconds
    while not path.exists() or len(path.read_text().splitlines()) < step:
        assert time.monotonic() < end and all(p.poll() is None for p in processes)
        time.sleep(0.05)


@pytest.mark.slow
def test_sigterm_to_one_saves_for_both_and_one_alone_goes_on(tmp_path):
    """All end at one step with status 0; another number of hosts sees the same records."""
    workdir = tmp_path / "two"
    with started(workdir, 2, *SMALL, "keep.every=500", f"steps={LENGTH}") as processes:
        wait_for(workdir, 3, processes)
        begun = time.monotonic()
        os.kill(processes[1].pid, signal.SIGTERM)
        found = ended(processes, 60)
        print(f"\nboth ended {time.monotonic() - begun:.1f} s after the signal")
    assert [status for status, _ in found] == [0, 0], found
    (step,) = checkpoint.steps(workdir / "checkpoints")
    assert f"asked to end: step {step} is saved" in found[0][1]
    rest = ("mesh=data=2,fsdp=2", "eval_every=1000", "keep.every=500", f"steps={LENGTH}")
    whole = tmp_path / "whole"
    for folder in (workdir, whole):
        run(folder, *rest, devices=2 * DEVICES)
    assert [r["step"] for r in rows(workdir) if "loss" in r] == list(range(1, LENGTH + 1))
    far = step + 5
    apart = np.abs(losses(workdir)[:far] / losses(whole)[:far] - 1).max()
    print(f"two hosts until step {step}, then one: losses differ by {apart:.1e} at most")
    assert apart < 1e-4


@pytest.mark.slow
def test_hosts_that_disagree_are_named_before_the_first_step(tmp_path):
    other = {1: ("optimizer.rate.peak=0.5",)}
    with started(tmp_path / "run", 2, *SMALL, each=other) as processes:
        found = ended(processes, 120)
    for status, out in found:
        assert status == 2 and "process 1 on " in out and "has another config than" in out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_who_loses_the_other_ends_within_a_minute_and_goes_on_later(tmp_path):
    workdir = tmp_path / "run"
    with started(workdir, 2, *SMALL, "keep.every=5") as processes:
        wait_for(workdir, 12, processes)
        os.kill(processes[1].pid, signal.SIGKILL)
        begun = time.monotonic()
        (status, out), _ = ended(processes, 60)
        print(f"\nthe other ended after {time.monotonic() - begun:.1f} s, status {status}")
    assert status not in (0, 2), out
    saved = checkpoint.steps(workdir / "checkpoints")[-1]
    assert saved >= 5
    last = json.loads((workdir / "config.json").read_text())["experiment"]["steps"]
    assert last == 1000
    resumed = ("mesh=data=2,fsdp=2", "eval_every=1000", "keep.every=500")
    run(workdir, *resumed, f"steps={saved + 2}", devices=2 * DEVICES)
    assert rows(workdir)[-1]["step"] == saved + 2


@pytest.mark.slow
def test_a_frozen_host_ends_the_other_within_a_minute(tmp_path):
    """Stopped whole it gives no sign of life, which JAX sees; the other is aborted."""
    workdir = tmp_path / "run"
    with started(workdir, 2, *SMALL) as processes:
        wait_for(workdir, 3, processes)
        os.kill(processes[1].pid, signal.SIGSTOP)
        begun = time.monotonic()
        processes[0].communicate(timeout=60)
        print(f"\nended after {time.monotonic() - begun:.1f} s")
    assert processes[0].returncode not in (0, 2)


def test_who_stands_still_is_ended_with_its_stacks():
    """A thread that waits for ever while its process lives: JAX would never notice."""
    code = (
        "import time\nfrom train.watch import Watchdog\n"
        "with Watchdog(0.4) as dog:\n    dog.alive(7)\n    time.sleep(60)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert found.returncode == STUCK == 3
    assert "stood still for" in found.stderr and "after step 7" in found.stderr
    assert "Thread 0x" in found.stderr and 'File "<string>", line 5' in found.stderr


def test_one_process_saves_at_sigterm_too(tmp_path):
    with started(tmp_path, 1, *SMALL, "mesh=data=2", "keep.every=500") as processes:
        wait_for(tmp_path, 3, processes)
        os.kill(processes[0].pid, signal.SIGTERM)
        ((status, out),) = ended(processes, 60)
    (step,) = checkpoint.steps(tmp_path / "checkpoints")
    assert status == 0 and f"asked to end: step {step} is saved" in out
    assert jax.process_count() == 1
