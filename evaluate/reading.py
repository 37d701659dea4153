"""Pages read back as text, letter by letter, and how much of it is wrong."""

from dataclasses import dataclass

from evaluate.edits import error_rates
from evaluate.generate import generate
from evaluate.run import Trained
from jaxformer import metrics
from jaxformer.data.images import pixels_of
from jaxformer.data.loader import Pipeline
from jaxformer.data.pages import IMAGE, Read, decode
from jaxformer.errors import InputError
from jaxformer.samplers.logits import GREEDY


@dataclass(frozen=True)
class Reading:
    """`cer`, `wer` and `exact` of every page of `test`, see `edits.error_rates`.

    `test` is a pipeline as `data.pages.Read` ends it. Text is generated greedily with a
    cache, as long as the page's: an error may bring others after it.
    """

    test: Pipeline

    def check(self) -> None:
        """Raises InputError where the pipeline does not end as it must."""
        last = self.test.transforms[-1] if self.test.transforms else None
        if not isinstance(last, Read):
            raise InputError(f"the transforms end in {type(last).__name__}, and not in Read")

    def run(self, trained: Trained) -> metrics.Metrics:
        return error_rates(*read(trained, self.test))


def read(trained: Trained, test: Pipeline) -> tuple[list[str], list[str]]:
    """What a model reads on each page, and what is written there."""
    *before, last = test.transforms
    beside, truth = [], []
    for index in range(len(test.source)):
        record = test.source[index]
        truth.append(record["text"])
        for transform in before:
            record = transform(record)
        image = pixels_of(record)[None]
        beside.append({"images": image * 0 if last.blind else image})
    steps = max(map(len, truth))
    made = generate(
        trained,
        [[IMAGE] * last.places] * len(truth),
        length=last.places + steps,
        steps=steps,
        law=GREEDY,
        beside=beside,
    )
    return [decode(ids) for ids in made], truth
