"""Where the time of a run goes, as its log says: compile, input, steps, evaluation, saves."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterator

from jaxformer.errors import InputError

# What is told apart; of all that time the rest is steps.
KINDS = ("compile", "input", "evaluation", "save", "lost")


class Clock:
    """Seconds since they were last taken, by what they were spent on.

    `lost` seconds went into steps that were taken after the checkpoint that is resumed.
    """

    def __init__(self, lost: float = 0.0):
        self.spent = {"lost": lost} if lost else {}
        self.mark, self.worked = time.monotonic() - lost, time.process_time()

    @contextlib.contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """What happens inside is time for `kind`, one of `KINDS`."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.spent[kind] = self.spent.get(kind, 0.0) + time.monotonic() - begun

    def take(self) -> dict[str, float]:
        """The entries of a row of the log; counts anew from here.

        Among them `seconds/all`, and `seconds/cpu`, those of all cores for this process.
        """
        now, worked = time.monotonic(), time.process_time()
        row = {f"seconds/{kind}": seconds for kind, seconds in self.spent.items()}
        row |= {"seconds/all": now - self.mark, "seconds/cpu": worked - self.worked}
        self.spent, self.mark, self.worked = {}, now, worked
        return row


def total(path: pathlib.Path) -> dict[str, float]:
    """Seconds of a whole run by kind, with `steps`, from its metrics.jsonl.

    Raises:
      InputError: no such file, or one without times.
    """
    if not path.is_file():
        raise InputError(f"{path.parent}: holds no metrics.jsonl; name a run's directory")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {kind: math.fsum(r.get(f"seconds/{kind}", 0.0) for r in rows) for kind in KINDS}
    whole = math.fsum(r.get("seconds/all", 0.0) for r in rows)
    if not whole:
        raise InputError(f"{path}: tells no times; it is of an older run")
    return {"steps": whole - sum(found.values())} | found
