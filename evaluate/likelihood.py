"""What a language model makes of texts it has not seen: nats, perplexity, bits per byte."""

import dataclasses
from dataclasses import dataclass

import jax

from evaluate.run import Trained
from jaxformer import metrics
from jaxformer.data.loader import Pipeline
from jaxformer.objectives.next_token import NextToken


@dataclass(frozen=True)
class Likelihood:
    """`loss`, `perplexity`, `accuracy` and `bits_per_byte` of all of `test`.

    Over `rows.Windows` that is with a sliding context, each token once: exact, on any mesh
    and in batches of any size.
    """

    test: Pipeline
    objective: NextToken = dataclasses.field(default_factory=NextToken)

    def run(self, trained: Trained) -> metrics.Metrics:
        def measure(apply, params, batch):
            return self.objective.measure(apply, params, batch, jax.random.key(0))

        return trained.measure(measure, self.test)
