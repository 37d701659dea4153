"""What a picture is to be of: a class, or none, so that guidance can compare."""

import dataclasses
from typing import Any

from jax.core import Tracer
from jaxtyping import Array, Int

from jaxformer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Classes:
    """Labels from 0 to `count - 1`, and `count` itself for none: the null label.

    The model replaces some labels by it while it learns (0.1 in DiT and nearly all since; Ho
    and Salimans 2022, arXiv 2207.12598). One that never does so cannot be guided.
    """

    count: int

    def __post_init__(self):
        if self.count < 1:
            raise InputError(f"classes.count={self.count} must be 1 or more")

    @property
    def null(self) -> int:
        """The label that says nothing."""
        return self.count

    def check(self, model: Any, pipeline: Any) -> None:
        """Raises InputError where the classes of model and data are not these."""
        known = getattr(model, "num_classes", None)
        if known is not None and known != self.count:
            raise InputError(
                f"objective.classes.count={self.count} is not model.num_classes={known}; set "
                f"model.num_classes={self.count}, whose table has a row more, the null label"
            )
        found = getattr(pipeline.source, "num_classes", self.count)
        if found > self.count:
            raise InputError(
                f"{type(pipeline.source).__name__} has {found} classes, more than "
                f"objective.classes.count={self.count}; raise it to {found}"
            )


def known(label: Int[Array, " B"], classes: Classes | None) -> None:
    """Raises InputError for a label outside the table, where labels are at hand."""
    if classes is None:
        raise InputError("the objective has no classes; give it some, or ask for no label")
    if isinstance(label, Tracer) or not label.size:
        return
    low, high = int(label.min()), int(label.max())
    if low < 0 or high > classes.count:
        wrong = low if low < 0 else high
        raise InputError(
            f"class {wrong} is outside the table of {classes.count} classes; give 0 to "
            f"{classes.count - 1}, or {classes.count} for any"
        )
