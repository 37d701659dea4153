"""Zero-shot classification: the class whose text lies nearest to the image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evaluate.features import Features, image, text
from evaluate.run import Trained
from jaxformer import metrics, probe
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Record
from jaxformer.errors import InputError


@dataclass(frozen=True)
class ZeroShot:
    """Classes of `test` by the cosine of an image with the classes' names.

    The source of `test` has `classes`, the names by label. A name is put into every one
    of `prompts`, `spell` makes `tokens` of the record's `text`, and a class is the mean
    direction of its prompts: Radford et al. 2021 (CLIP). Gives `top1` and `top5`.
    """

    test: Pipeline
    spell: Callable[[Record], Record]
    prompts: tuple[str, ...] = ("{}",)
    image: Features = image
    text: Features = text

    def check(self) -> None:
        """Raises InputError where names or prompts are missing, or a text does not fit."""
        source = self.test.source
        if not getattr(source, "classes", None):
            raise InputError(
                f"{type(source).__name__} does not tell the names of its classes; zero-shot "
                "needs a source with `classes`"
            )
        if not self.prompts or any("{}" not in prompt for prompt in self.prompts):
            raise InputError(
                f"prompts={self.prompts!r} must be one text or more with {{}} in each, "
                "where the class's name goes"
            )
        for index in range(len(self._texts)):
            self.spell(self._texts[index])

    @property
    def _texts(self) -> "_Texts":
        source: Any = self.test.source
        names = source.classes
        return _Texts(tuple(p.replace("{}", n) for n in names for p in self.prompts))

    def run(self, trained: Trained) -> metrics.Metrics:
        rows = trained.collect(self.text, Pipeline(self._texts, (self.spell,)))
        prompts = rows.reshape(-1, len(self.prompts), rows.shape[-1])

        def measure(apply, params, batch, prompts):
            images = self.image(apply, params, batch)
            scores = probe.zero_shot(images, probe.ensemble(prompts))
            return metrics.top(scores, batch["label"], batch["weight"])

        return trained.measure(measure, self.test, prompts)


@dataclass(frozen=True)
class _Texts:
    """Texts as a source of records."""

    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Record:
        return {"text": self.texts[index], "source": repr(self.texts[index])}
