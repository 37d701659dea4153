"""`kill -9` at random moments, each time restarted: the same parameters, bit for bit."""

import pathlib
import random
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxformer import checkpoint
from jaxformer.sharding import path_name
from train.faults.processes import begin, end, rows, wait_for
from train.faults.row import Row, wrongs

RUN = (
    "configs/vit_digits.py", "keep.every=5", "eval_every=100", "model.depth=2",
    "ema=0.9", "log_every=1", "model.dropout=0.1",
)  # fmt: skip


STEPS = 120
MOST = STEPS - 11  # Each kill is at a step of its own, and some steps are left to take.


def killed(folder: pathlib.Path, kills: int = 20, steps: int = STEPS, say=print) -> Row:
    """A run that is killed so often, every other time while it saves, and one that is not."""
    whole, broken = folder / "whole", folder / "broken"
    begun = time.monotonic()
    _to_its_end(folder, whole, steps)
    say(f"uninterrupted: {time.monotonic() - begun:.0f} s")
    draw = random.Random(0)
    # Moments are steps, spread over the run, and a fraction of a step or a save beyond.
    moments = sorted(draw.sample(range(1, steps - 10), kills))
    saving = 0
    for number, moment in enumerate(moments, start=1):
        process = _start(folder, broken, steps)
        try:
            wait_for(broken, moment, [process], 300)
            if number % 2:
                time.sleep(draw.uniform(0, 0.3))
            else:
                _wait_for_a_save(broken, process)
        finally:
            end(process)
        half = bool(_half(broken))
        saving += half
        saved = checkpoint.steps(broken / "checkpoints")
        say(
            f"kill {number}: after step {moment}, saved {saved[-1] if saved else 'nothing'}"
            f"{', and half of another' if half else ''}"
        )
    _to_its_end(folder, broken, steps)
    a, b = params(whole, steps), params(broken, steps)
    equal = sum(a[name] == b.get(name) for name in a)
    return Row(
        f"kill -9 at {kills} random moments, {saving} of them during a save",
        f"{equal} of {len(a)} leaves of the last checkpoint bitwise those of the run that was "
        "let be",
        wrongs(
            every_leaf_is_equal=a == b and len(a) > 60,
            no_row_is_lost=rows(whole) == rows(broken),
            some_kills_met_a_save=saving > 0,
        ),
        {"kills": kills, "during_a_save": saving, "leaves": len(a), "equal": equal},
    )


def params(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    """The bytes of every leaf of the last checkpoint, which is that of `step`."""
    folder = checkpoint.find(workdir)
    if (last := checkpoint.steps(folder)[-1]) != step:
        raise RuntimeError(f"{folder}: the last checkpoint is {last} and not {step}")
    path = folder.absolute() / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(path).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
    return {path_name(p): x.tobytes() for p, x in jax.tree.leaves_with_path(tree)}


def _start(folder: pathlib.Path, workdir: pathlib.Path, steps: int) -> subprocess.Popen:
    environment = {
        "XLA_FLAGS": "",  # It computes more than it compiles: with the optimizer.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = ("train", *RUN, f"steps={steps}", "--workdir", str(workdir))
    return begin(command, environment)


def _to_its_end(folder: pathlib.Path, workdir: pathlib.Path, steps: int) -> None:
    process = _start(folder, workdir, steps)
    try:
        out, _ = process.communicate(timeout=600)
        if process.returncode:
            raise RuntimeError(f"a run ended with status {process.returncode}: {out}")
    finally:
        end(process)


def _wait_for_a_save(workdir: pathlib.Path, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 60
    while not _half(workdir) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.0005)


def _half(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints that are being written, or were when the run was killed."""
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
