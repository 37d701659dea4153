"""`kill -9` at random moments, each time restarted: the same parameters, bit for bit."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxformer import checkpoint
from jaxformer.sharding import path_name

ROOT = pathlib.Path(__file__).parents[2]
KILLS = 10
RUN = (
    "configs/vit_digits.py", "steps=300", "keep.every=5", "eval_every=100", "model.depth=2",
    "ema=0.9", "log_every=1", "model.dropout=0.1",
)  # fmt: skip


def start(workdir: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "train", *RUN, "--workdir", str(workdir)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # It computes more than it compiles: with the optimizer.
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )


def params(workdir: pathlib.Path) -> dict[str, bytes]:
    """The bytes of every leaf of the last checkpoint."""
    folder = checkpoint.find(workdir)
    assert checkpoint.steps(folder)[-1] == 300
    path = folder.absolute() / "300" / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(path).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
    return {path_name(p): x.tobytes() for p, x in jax.tree.leaves_with_path(tree)}


def rows(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    whole, broken, cache = tmp_path / "whole", tmp_path / "broken", tmp_path / "cache"
    begun = time.monotonic()
    assert start(whole, cache).wait(600) == 0
    print(f"\nuninterrupted: {time.monotonic() - begun:.0f} s")
    draw = random.Random(0)
    # Moments are steps, spread over the run, and a fraction of a step or a save beyond.
    moments = sorted(draw.sample(range(1, 290), KILLS))
    for number, moment in enumerate(moments, start=1):
        process = start(broken, cache)
        try:
            deadline = time.monotonic() + 300
            while rows(broken) < moment:
                assert process.poll() is None, "the run ended or failed on its own"
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.3))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        saved = checkpoint.steps(broken / "checkpoints")
        print(f"kill {number}: after step {moment}, saved {saved[-1] if saved else 'nothing'}")
    assert start(broken, cache).wait(600) == 0
    a, b = params(whole), params(broken)
    equal = sum(a[name] == b[name] for name in a)
    print(f"{equal} of {len(a)} leaves bitwise equal after {KILLS} kills")
    assert a == b and len(a) > 60
    assert rows(whole) == rows(broken)
