"""Exact match of answers to questions about images, by kind of question."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from evaluate.run import Trained
from jaxformer import metrics
from jaxformer.data.loader import Pipeline
from jaxformer.data.scenes import KINDS, READING
from jaxformer.objectives.next_token import NextToken, following, scores


@dataclass(frozen=True)
class VQA:
    """How often an answer is right to its last token, end and all: integers, by kind.

    `test` is a pipeline as `data.scenes.Ask` ends it: question `i` of a row is segment
    `i + 2`, of kind `kinds[i]`. Answers are not generated: the greedy answer is the true
    one just where each of its tokens is the first choice after those before it, which one
    pass tells. `reading` is over all questions of the kinds `reading`, `all` over all.
    """

    test: Pipeline
    kinds: tuple[str, ...] = tuple(KINDS)
    reading: tuple[str, ...] = READING
    objective: NextToken = dataclasses.field(default_factory=NextToken)

    def run(self, trained: Trained) -> metrics.Metrics:
        def measure(apply, params, batch):
            given = [batch[name] for name in self.objective.inputs]
            x = apply({"params": params}, *given, method="hidden", segments=batch["segments"])
            targets, weight = following(batch)
            _, _, right = scores(apply, params, x, targets, self.objective.chunk)
            ids = jnp.arange(2, 2 + len(self.kinds))[None, :, None]
            own = (batch["segments"][:, None] == ids) & (weight > 0)[:, None]
            asked = own.any(2)
            exact = asked & ~(own & ~right[:, None]).any(2)
            return self._counted(exact, asked)

        return trained.measure(measure, self.test)

    def _counted(self, exact, asked) -> metrics.Metrics:
        def mean(columns: list[int]) -> metrics.Mean:
            where = jnp.array(columns)
            return metrics.Mean(
                exact[:, where].sum(dtype=jnp.int32), asked[:, where].sum(dtype=jnp.int32)
            )

        found: metrics.Metrics = {kind: mean([i]) for i, kind in enumerate(self.kinds)}
        reading = [i for i, kind in enumerate(self.kinds) if kind in self.reading]
        if reading:
            found["reading"] = mean(reading)
        return found | {"all": mean(list(range(len(self.kinds))))}
