"""Flow matching of images that a text tells of."""

import dataclasses

from jaxformer.objectives.flow import Flow


@dataclasses.dataclass(frozen=True)
class TextFlow(Flow):
    """`Flow` of `batch["image"]`, given what `told` names of the batch: a text's ids, or the
    vectors of another model's, and what else a model of texts takes.

    The model is called `(x, t, *told)`.
    """

    told: tuple[str, ...] = ("tokens",)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The entries of a batch that it reads."""
        return ("image", *self.told)
