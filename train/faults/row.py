"""One line of the table of faults."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """What was done, what was seen, and what of it should not have been: nothing, at best.

    `numbers` are those in `shown` and more, for JSON.
    """

    fault: str
    shown: str
    wrong: tuple[str, ...] = ()
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)


def wrongs(**checks: bool) -> tuple[str, ...]:
    """The names of the checks that are false, as words."""
    return tuple(name.replace("_", " ") for name, good in checks.items() if not good)
