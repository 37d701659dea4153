"""Two processes on one machine: one run, whatever happens to one of them."""

import subprocess
import sys

import numpy as np
import pytest

from jaxformer import checkpoint
from tests.train.test_train import losses, rows, run
from train.faults import signals
from train.faults.processes import DEVICES, ROOT, ended, started
from train.watch import STUCK

LENGTH = 60  # steps of the run that comes to its end.


@pytest.mark.slow
def test_sigterm_to_one_saves_for_both_and_one_alone_goes_on(tmp_path):
    """All end at one step with status 0; another number of hosts sees the same records."""
    workdir = tmp_path / "two"
    found = signals.asked(workdir, 2, f"steps={LENGTH}")
    print(f"\n{found.shown}")
    assert not found.wrong
    (step,) = checkpoint.steps(workdir / "checkpoints")
    rest = (signals.MESH[2], "eval_every=1000", "keep.every=500", f"steps={LENGTH}")
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
    argv = (*signals.SMALL, signals.MESH[2])
    with started(tmp_path / "run", 2, *argv, each=other) as processes:
        found = ended(processes, 120)
    for status, out in found:
        assert status == 2 and "process 1 on " in out and "has another config than" in out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signals.lost, signals.frozen])
def test_who_loses_the_other_ends_within_a_minute(fault, tmp_path):
    found = fault(tmp_path / "run")
    print(f"\n{found.shown}")
    assert not found.wrong


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
    assert not signals.asked(tmp_path, 1).wrong


def test_what_has_no_steps_is_not_watched_and_batches_are_signs_of_life():
    code = (
        "import time\nfrom train.watch import Watchdog\n"
        "with Watchdog(0.8) as dog:\n    with dog.off():\n        time.sleep(1.6)\n"
        "    for _ in dog.fed(range(4)):\n        time.sleep(0.4)\n    print('alive')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "alive\n", done.stderr
