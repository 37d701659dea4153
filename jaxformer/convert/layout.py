"""How one tensor of theirs lies in one of ours, written as letters and read both ways.

`"(N H) D -> D N H"` says that their tensor has rows of heads, and ours the width first.
Letters name axes; a group in parentheses is one axis made of several, first letter slowest.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

Groups = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Their axes and ours, each as groups of letters."""

    theirs: Groups
    ours: Groups

    def shape_of_theirs(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that their tensor must have."""
        return tuple(math.prod(sizes[c] for c in group) for group in self.theirs)

    def sizes(self, ours: tuple[int, ...], given: Mapping[str, int]) -> dict[str, int]:
        """The size of every letter, from the shape of ours and what is given of groups.

        A group of ours with one letter that is not given takes what is left of its axis.
        """
        found = dict(given)
        for group, size in zip(self.ours, ours, strict=True):
            free = [c for c in group if c not in found]
            known = math.prod(found[c] for c in group if c in found)
            if len(free) > 1 or size % known or (not free and size != known):
                raise ValueError(f"axis {group} of {size} does not divide by {dict(given)}")
            if free:
                found[free[0]] = size // known
        return found

    def to_ours(self, x: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Their tensor, or some of it with `sizes` to match, as ours."""
        return _move(x, self.theirs, self.ours, sizes)

    def to_theirs(self, x: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Our array as theirs."""
        return _move(x, self.ours, self.theirs, sizes)

    @property
    def rows(self) -> str | None:
        """The letter along which their rows can be read in pieces, if there is one.

        It is the slowest of their first axis, and an axis of its own in ours.
        """
        letter = self.theirs[0][0] if self.theirs and self.theirs[0] else None
        return letter if (letter,) in self.ours else None


@functools.cache
def parse(text: str) -> Layout:
    """`"(N H) D -> D N H"` as a Layout.

    Raises:
      ValueError: the two sides have different letters.
    """
    theirs, ours = (_groups(side) for side in text.split("->"))
    if sorted(sum(theirs, ())) != sorted(sum(ours, ())):
        raise ValueError(f"{text!r}: both sides must have the same letters")
    return Layout(theirs, ours)


def _groups(text: str) -> Groups:
    parts = re.findall(r"\(([^)]*)\)|(\S+)", text)
    return tuple(tuple(group.split()) if not one else (one,) for group, one in parts)


def _move(x: np.ndarray, source: Groups, target: Groups, sizes: Mapping[str, int]):
    order, wanted = sum(source, ()), sum(target, ())
    x = x.reshape([sizes[c] for c in order])
    x = x.transpose([order.index(c) for c in wanted])
    return x.reshape([math.prod(sizes[c] for c in group) for group in target])
