"""What ends a run from outside of it: a signal that asks, and a silence that lasts."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

STUCK = 3  # the exit status of a run that stood still.


class Preempted:
    """Notes SIGTERM; `at(step)` says, to all processes alike, that now is the time to go.

    Where JAX runs several processes it notes the signal itself and finds a step that none
    of them has passed.
    """

    def __init__(self):
        self.asked = False
        self._before = None

    def __enter__(self) -> "Preempted":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number, frame) -> None:
        self.asked = True

    def at(self, step: int) -> bool:
        """True at the one step after which every process saves and ends."""
        if jax.process_count() == 1:
            return self.asked
        return multihost_utils.reached_preemption_sync_point(step)


class Watchdog:
    """Ends the process where nothing moved for `patience` seconds; 0 waits for ever.

    A host that stands still is alive to JAX, so that all others would wait for it. The
    stacks of all threads go to standard error, and the status is `STUCK`.
    """

    def __init__(self, patience: float):
        self.patience = patience
        self.step, self.moved = 0, time.monotonic()
        self._over, self._looks = threading.Event(), True

    def __enter__(self) -> "Watchdog":
        if self.patience:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._over.set()

    def alive(self, step: int) -> None:
        """Something was done; the last step that ended is `step`."""
        self.step, self.moved = step, time.monotonic()

    def fed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same, each a sign of life."""
        for batch in batches:
            self.alive(self.step)
            yield batch

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Nobody watches what is done within, which has no steps."""
        self._looks = False
        yield
        self.alive(self.step)
        self._looks = True

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.patience / 4)):
            still = time.monotonic() - self.moved
            if self._looks and still > self.patience:
                print(
                    f"error: process {jax.process_index()} stood still for {still:.0f} s after "
                    f"step {self.step}; where, is below. Start it again: it goes on from the "
                    "last checkpoint (train --patience sets the time)",
                    file=sys.stderr,
                )
                faulthandler.dump_traceback(all_threads=True)
                sys.stderr.flush()
                os._exit(STUCK)
