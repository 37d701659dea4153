"""What a language model makes of texts it has not seen: nats, perplexity, bits per byte."""

import dataclasses
from dataclasses import dataclass

from evaluate.run import Trained
from jaxformer import metrics
from jaxformer.data.loader import Pipeline
from jaxformer.objectives.next_token import NextToken
from jaxformer.objectives.unmask import Unmask


@dataclass(frozen=True)
class Likelihood:
    """`loss`, `perplexity`, `accuracy` and `bits_per_byte` of all of `test`.

    Over `rows.Windows` that is with a sliding context, each token once: exact, on any mesh
    and in batches of any size. What `Unmask` gives is a bound, with its error.
    """

    test: Pipeline
    objective: NextToken | Unmask = dataclasses.field(default_factory=NextToken)

    def run(self, trained: Trained) -> metrics.Metrics:
        return trained.score(self.objective, self.test)
