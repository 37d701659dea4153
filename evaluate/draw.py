"""Pictures out of a trained model of noise, drawn over its mesh."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from evaluate.generate import Records
from evaluate.run import Trained
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.objectives.condition import known
from jaxformer.samplers.autoregressive import fold
from jaxformer.samplers.guidance import NONE, Guidance
from jaxformer.samplers.noise import start
from jaxformer.samplers.ode import Ode

PIXELS, ODE = Normalize(), Ode()


@dataclass(frozen=True)
class Draw:
    """How pictures are drawn: `shape` of one, by which sampler, how guided, from which seed.

    `normalize` is the data's, and is undone: pixels come out in [0, 1], what is beyond cut.
    """

    shape: tuple[int, int, int]
    normalize: Normalize = PIXELS
    sampler: Any = ODE
    guidance: Guidance = NONE
    seed: int = 0

    def images(
        self, trained: Trained, labels: Sequence[int] | None, count: int | None = None
    ) -> Float[np.ndarray, "B Y X C"]:
        """A picture of each label, or `count` of none, in order.

        Picture i is that of `seed`, i and its label alone, on any mesh and in any batch.

        Raises:
          InputError: a class outside the table, guidance without a null label, a sampler
            of another objective or with more steps than its schedule.
        """
        objective = trained.objective
        classes = objective.classes
        self.guidance.check(trained.model, classes)
        if labels is None:
            records = [{"number": np.int32(i)} for i in range(count or 0)]
        else:
            known(jnp.asarray(labels), classes)
            records = [
                {"number": np.int32(i), "label": np.int32(label)}
                for i, label in enumerate(labels)
            ]

        def run(apply, params, batch):
            def says(x, t, *label):
                return apply({"params": params}, x, t, *label)

            number = batch["number"]
            keys = fold(jax.random.key(self.seed)[None].repeat(len(number), 0), number)
            model = self.guidance.of(says, batch.get("label"), classes)
            x = start(keys, (len(number), *self.shape))
            return self.sampler.draw(model, objective, x, keys)

        drawn = trained.collect(run, Pipeline(Records(records)))
        mean = np.asarray(self.normalize.mean, np.float32)
        std = np.asarray(self.normalize.std, np.float32)
        return np.clip(drawn * std + mean, 0, 1)

    def about(self, trained: Trained) -> dict[str, Any]:
        """What has to be known to draw the same again."""
        return {
            "sampler": repr(self.sampler),
            "steps": self.sampler.steps,
            "guidance": self.guidance.scale,
            "guided": repr(self.guidance),
            "ema": trained.averaged,
            "seed": self.seed,
        }
