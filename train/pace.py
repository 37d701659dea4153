"""Steps that took far longer than is usual, and the host that was late."""

import collections
import contextlib
import json
import pathlib
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

SPAN, LEAST = 32, 8  # steps that a median is of: at most, and at least.
TIMES, SECONDS = 3.0, 1.0  # A slow step is so many times the median, and so much above it.
PULSE = 0.25  # seconds between two signs of life.


class Pace:
    """Knows how long steps take, and how long of that this host let the others wait.

    Hosts meet in every step, so that all are as slow as the slowest. What a host does while
    its devices do not keep it waiting, input above all, is its own time, and so is time in
    which it stood still, which is seen by a pulse that comes late. By that each knows whether
    it was late itself, with nothing sent. Of a slow chip or link all say that they waited.

    Rows go to `slow.PROCESS.jsonl`: `step`, `host`, `process`, its `seconds`, those that are
    `usual`, and how many this host was `late`.
    """

    def __init__(self, workdir: pathlib.Path):
        self.process, self.host = jax.process_index(), socket.gethostname()
        self.path = workdir / f"slow.{self.process}.jsonl"
        self.whole: collections.deque[float] = collections.deque(maxlen=SPAN)
        self.own: collections.deque[float] = collections.deque(maxlen=SPAN)
        self.mark: float | None = None
        self.waited = self.still = 0.0
        self._over = threading.Event()

    def __enter__(self) -> "Pace":
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._over.set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside waits for the devices."""
        begun, still = time.monotonic(), self.still
        try:
            yield
        finally:
            seconds = time.monotonic() - begun
            self.waited += max(0.0, seconds - (self.still - still))

    def resume(self) -> None:
        """Leaves out what was done since the last step: an evaluation, a save, a compile."""
        self.mark, self.waited = time.monotonic(), 0.0

    def step(self, step: int) -> str | None:
        """A step has ended; what there is to say of it, if it was slow."""
        mark, waited = self.mark, self.waited
        self.resume()
        if mark is None or self.mark is None:
            return None
        row = self.seen(step, self.mark - mark, self.mark - mark - waited)
        if row is None:
            return None
        with contextlib.suppress(OSError), self.path.open("a") as file:  # The log will tell.
            file.write(json.dumps(row) + "\n")
        took = f"step {step} took {row['seconds']:.1f} s, {row['usual']:.2g} s is usual"
        me = f"{self.host} (process {self.process})"
        if is_late(row):
            return f"warning: {took}: {me} was {row['late']:.1f} s late"
        if self.process:
            return None  # One of those that waited is enough.
        return f"warning: {took}: {me} waited; another host, a chip or a link was late"

    def seen(self, step: int, whole: float, own: float) -> dict[str, Any] | None:
        """Takes the seconds of a step and those that were this host's own; a row if slow."""
        if len(self.whole) >= LEAST:
            usual = statistics.median(self.whole)
            if whole > TIMES * usual and whole > usual + SECONDS:
                late = max(0.0, own - statistics.median(self.own))
                about = {"step": step, "host": self.host, "process": self.process}
                return about | {"seconds": whole, "usual": usual, "late": late}
        self.whole.append(whole)
        self.own.append(own)
        return None

    def _beat(self) -> None:
        while True:
            begun = time.monotonic()
            if self._over.wait(PULSE):
                return
            late = time.monotonic() - begun - PULSE
            self.still += late if late > PULSE else 0.0


def is_late(row: dict[str, Any]) -> bool:
    """Whether most of what a step took too long was this host's doing."""
    return row["late"] > (row["seconds"] - row["usual"]) / 2


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What all hosts wrote of the slow steps of a run."""
    paths = sorted(workdir.glob("slow.*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def slow(workdir: pathlib.Path) -> list[str]:
    """Lines that tell of the slow steps of a run, by host."""
    longest: dict[int, dict[str, Any]] = {}
    late: dict[str, list[float]] = {}
    for row in rows(workdir):
        step = longest.setdefault(row["step"], {"above": 0.0, "told": False})
        step["above"] = max(step["above"], row["seconds"] - row["usual"])
        if is_late(row):
            step["told"] = True
            name = f"{row['host']} (process {row['process']})"
            late.setdefault(name, []).append(row["late"])
    if not longest:
        return []
    lost = sum(step["above"] for step in longest.values())
    lines = [f"slow steps: {len(longest)}, {lost:,.1f} s above what is usual"]
    lines += [
        f"  {name} was late in {len(found)}, by {sum(found):,.1f} s"
        for name, found in sorted(late.items(), key=lambda pair: -sum(pair[1]))
    ]
    untold = sum(not step["told"] for step in longest.values())
    return [*lines, f"  in {untold} no host was late: a chip, or a link"] if untold else lines
