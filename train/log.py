"""What a run tells: a progress bar, one JSON object a line, TensorBoard, a picture."""

import contextlib
import importlib.metadata
import json
import math
import pathlib
import platform
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from jaxformer.experiment import Experiment
from jaxformer.plan.chips import peak
from train.curves import draw
from train.goodput import Clock

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Unsaved(RuntimeError):
    """A checkpoint or a row could not be written; one sentence says where and what remains."""


class Log:
    """Writes into `workdir`; on resume it forgets what came after the checkpoint.

    `left_out` is how many steps were skipped up to now.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        experiment: Experiment,
        described: dict[str, Any],
        *,
        start: int,
        flops: int | None,
    ):
        self.workdir, self.every = workdir, experiment.log_every
        self.steps, self.batch_size = experiment.steps, experiment.batch_size
        self.peak = _peak() if flops else None
        self.flops = flops
        self.first_process = jax.process_index() == 0
        self.path = workdir / "metrics.jsonl"
        self.clock, self.left_out = Clock(), 0.0
        if self.first_process:
            _write_config(workdir / "config.json", described)
            self._open(start)
        self.console = Console(stderr=False, highlight=False, soft_wrap=True)
        self.console.quiet = not self.first_process
        self.bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("compiling", total=self.steps, completed=start)
        self.counted, self.spent, self.mark = 0, 0.0, time.monotonic()
        self.skipped, self.skips_in_a_row = 0.0, 0

    def _open(self, start: int, lost: float = 0.0) -> None:
        """The files as they were after step `start`, to go on from there."""
        self.clock = Clock(lost=lost + _rewind(self.path, start))
        self.left_out = sum(row.get("skipped", 0.0) for row in self._rows())
        self.file = self.path.open("a")
        board = str(self.workdir / "tensorboard")
        self.board = SummaryWriter(board, purge_step=start + 1)

    def back(self, step: int, spoiled: int, batches: int, why: str) -> None:
        """Forgets what came after a checkpoint, and tells from which step the run went back."""
        lost = self.clock.take()["seconds/all"]
        if self.first_process:
            self.file.close()
            self.board.close()
            self._open(step, lost)
        self._write(step, {"back/from": spoiled, "back/batches": batches})
        self.say(
            f"warning: step {spoiled}: {why}; back to the checkpoint of step {step}, and the "
            f"{batches} batches read since are left out"
        )
        self.counted, self.spent, self.mark = 0, 0.0, time.monotonic()

    def __enter__(self) -> "Log":
        self.bar.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.bar.stop()
        if self.first_process:
            with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                self.file.close()
                self.board.close()
            picture = self.workdir / "curves.png"
            if error is None and draw(self.path, picture):
                self.say(f"curves: {picture}")

    def say(self, text: str, *, all_processes: bool = False) -> None:
        """Prints one line above the bar; the first process alone does, if not all are to."""
        if all_processes and not self.first_process:
            print(text, flush=True)
        self.console.print(text, markup=False)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the metrics of a step that has ended; every so many are written."""
        now = time.monotonic()
        self.spent, self.mark = self.spent + now - self.mark, now
        self.counted += 1
        skipped = metrics.get("skipped", 0.0)
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        self.skipped += skipped
        self.left_out += skipped
        broken = not math.isfinite(metrics["loss"])
        due = step % self.every == 0 or step == self.steps or broken
        if due:
            rate = self.counted * self.batch_size / self.spent
            row = metrics | {"examples_per_second": rate}
            if "skipped" in row:
                row["skipped"], self.skipped = self.skipped, 0.0  # Since the last row.
            if self.peak is not None and self.flops is not None:
                row["mfu"] = self.flops / self.batch_size * rate / self.peak
            self._write(step, row)
            self.counted, self.spent = 0, 0.0
            text = _text(row)
            self.bar.update(self.task, completed=step, description=text)
            if not self.console.is_terminal and step % (10 * self.every) == 0:
                self.say(f"step {step}/{self.steps}  {text}")

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Writes and prints what an evaluation found."""
        self._write(step, {f"eval/{name}": value for name, value in scores.items()})
        text = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self.say(f"step {step}/{self.steps}  {text}")

    def told(self, step: int, name: str) -> bool:
        """Whether an evaluation of this name was written down at this step."""
        rows = self._rows() if self.first_process else []
        own = [row for row in rows if row["step"] == step]
        found = any(key.startswith(f"eval/{name}/") for row in own for key in row)
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(found)))

    def _rows(self) -> list[dict[str, Any]]:
        """What was written down until now."""
        return [json.loads(row) for row in self.path.read_text().splitlines()]

    def resume_clock(self) -> None:
        """Leaves the time since the last step, of an evaluation or a save, uncounted."""
        self.mark = time.monotonic()

    def _write(self, step: int, row: dict[str, float]) -> None:
        if self.first_process:
            row = row | self.clock.take()
            plain = {k: v if math.isfinite(v) else None for k, v in row.items()}
            try:
                self.file.write(json.dumps({"step": step} | plain) + "\n")
                self.file.flush()
            except OSError as error:
                raise Unsaved(
                    f"{self.path}: step {step} could not be written down ({error.strerror}); "
                    "make room there, and start the same command again: it goes on from the "
                    "last checkpoint"
                ) from error
            for name, value in row.items():
                self.board.add_scalar(name, value, step)


def _text(row: dict[str, float]) -> str:
    parts = [f"loss {row['loss']:.4f}"]
    parts += [f"accuracy {row['accuracy']:.3f}"] if "accuracy" in row else []
    parts += [f"{row['examples_per_second']:,.0f} examples/s"]
    parts += [f"MFU {row['mfu']:.1%}"] if "mfu" in row else []
    return "  ".join(parts)


def _peak() -> float | None:
    """Operations a second of all devices together, where the chip is known."""
    one = peak(jax.devices()[0].device_kind)
    return None if one is None else one * jax.device_count()


def _rewind(path: pathlib.Path, step: int) -> float:
    """Drops rows after `step`, and a last row that a kill cut short; the seconds in them."""
    rows = path.read_text().splitlines() if path.exists() else []
    kept, lost = [], 0.0
    for row in rows:
        try:
            found = json.loads(row)
            if found["step"] <= step:
                kept.append(row + "\n")
            else:
                lost += found.get("seconds/all", 0.0)
        except (ValueError, KeyError, TypeError):
            continue
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(kept))
    fresh.replace(path)
    return lost


def _write_config(path: pathlib.Path, described: dict[str, Any]) -> None:
    devices = jax.devices()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    resolved = {
        "experiment": described,
        "versions": {"python": platform.python_version(), **versions},
        "devices": {"kind": devices[0].device_kind, "count": len(devices)},
        "command": sys.argv,
    }
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(resolved, indent=2) + "\n")
    fresh.replace(path)
