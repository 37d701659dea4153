"""Steps whose loss says that they should not be kept."""

import collections
import math
import statistics

SPAN, LEAST = 32, 8  # losses that a median is of: at most, and at least.

WAYS = {  # What else a run that diverged could do, by its `nonfinite`.
    "stop": ", or set nonfinite=back to leave such batches out",
    "skip": "",
    "back": ", for going back did not help",
}


class Spoiled(Exception):
    """A step after which a run goes back to its last checkpoint; `what` is wrong with it."""

    def __init__(self, step: int, what: str):
        super().__init__(f"step {step}: {what}")
        self.step, self.what = step, what


class Spikes:
    """Knows the losses of the last steps, and tells one that is far above them.

    `times` the median of the last `SPAN` is far; None is never, and so is a median of 0 or
    less, whose multiples tell nothing. What was seen before a run was started again is not
    known, nor is what a loss will be that a stage begins with, so that `LEAST` steps pass.
    """

    def __init__(self, times: float | None):
        self.times = times
        self.losses: collections.deque[float] = collections.deque(maxlen=SPAN)
        self.stage: float | None = None

    def seen(self, loss: float, stage: float | None = None) -> str | None:
        """Takes the next loss, and its stage if there are any; what is wrong, if a thing."""
        if stage != self.stage:  # Losses of another kind are no measure of this one.
            self.losses.clear()
            self.stage = stage
        usual = statistics.median(self.losses) if len(self.losses) >= LEAST else math.inf
        if self.times is not None and usual > 0 and loss > self.times * usual:
            return (
                f"loss is {loss:.4g}, more than spike={self.times:g} times {usual:.4g}, the "
                f"median of the {len(self.losses)} before"
            )
        if math.isfinite(loss):
            self.losses.append(loss)
        return None
