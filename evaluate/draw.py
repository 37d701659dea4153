"""Pictures out of a trained model of noise, drawn over its mesh."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from evaluate.encoder import Encoder
from evaluate.generate import Records
from evaluate.run import Trained
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.text import Caption
from jaxformer.errors import InputError
from jaxformer.objectives.condition import Classes, known
from jaxformer.samplers.autoregressive import fold
from jaxformer.samplers.guidance import NONE, Guidance
from jaxformer.samplers.noise import start
from jaxformer.samplers.ode import Ode
from jaxformer.sharding import make_mesh

PIXELS, ODE = Normalize(), Ode()


@dataclass(frozen=True)
class Draw:
    """How pictures are drawn: `shape` of one, by which sampler, how guided, from which seed.

    `normalize` is the data's, and is undone: pixels come out in [0, 1], what is beyond cut.
    With an `autoencoder`, whose model has `decode`, `shape` is that of its latents, and
    `normalize` what its images went through. With `captions` the model is told a class in
    words, as `(x, t, tokens, real)`.
    """

    shape: tuple[int, int, int]
    normalize: Normalize = PIXELS
    sampler: Any = ODE
    guidance: Guidance = NONE
    seed: int = 0
    autoencoder: Encoder | None = None
    captions: Caption | None = None

    def check(self) -> None:
        """Raises InputError where there is no autoencoder."""
        if self.autoencoder is not None:
            self.autoencoder.check()

    def classes(self, trained: Trained) -> Classes | None:
        """What a picture can be asked to be of."""
        if self.captions is not None:
            return Classes(len(self.captions.names))
        return trained.objective.classes

    @functools.cached_property
    def size(self) -> tuple[int, ...]:
        """Rows and columns of a picture."""
        if self.autoencoder is None:
            return tuple(self.shape[:2])
        found, _ = self.autoencoder.load(make_mesh("", jax.local_devices()))
        latents = jax.ShapeDtypeStruct((1, *self.shape), jnp.float32)
        made = jax.eval_shape(functools.partial(_decode, found.apply), found.params, latents)
        return made.shape[1:3]

    def images(
        self, trained: Trained, labels: Sequence[int] | None, count: int | None = None
    ) -> Float[np.ndarray, "B Y X C"]:
        """A picture of each label, or `count` of none, in order.

        Picture i is that of `seed`, i and its label alone, on any mesh and in any batch.

        Raises:
          InputError: a class outside the table, guidance without a null label, a sampler
            of another objective or with more steps than its schedule, a shape that the
            model or the autoencoder does not take.
        """
        objective = trained.objective
        classes, captions = self.classes(trained), self.captions
        self.guidance.check(trained.model, classes)
        if labels is None:
            records = [{"number": np.int32(i)} for i in range(count or 0)]
        else:
            known(jnp.asarray(labels), classes)
            records = [
                {"number": np.int32(i), "label": np.int32(label)}
                for i, label in enumerate(labels)
            ]

        def told(label):
            if captions is None:
                return (label,)
            return tuple(jnp.asarray(of_all)[label] for of_all in captions.table)

        def run(apply, params, batch):
            def says(x, t, *label):
                about = told(*label) if label else ()
                return apply({"params": params}, x, t, *about)

            number = batch["number"]
            keys = fold(jax.random.key(self.seed)[None].repeat(len(number), 0), number)
            model = self.guidance.of(says, batch.get("label"), classes)
            x = start(keys, (len(number), *self.shape))
            return self.sampler.draw(model, objective, x, keys)

        try:
            drawn = self._decoded(trained.collect(run, Pipeline(Records(records))), trained)
        except InputError:
            raise
        except ValueError as error:  # Of channels or patches that are others.
            raise InputError(f"draw.shape={self.shape}: {error}") from error
        mean = np.asarray(self.normalize.mean, np.float32)
        std = np.asarray(self.normalize.std, np.float32)
        return np.clip(drawn * std + mean, 0, 1)

    def _decoded(self, drawn: np.ndarray, trained: Trained) -> np.ndarray:
        if self.autoencoder is None:
            return drawn
        decoder, _ = self.autoencoder.load(trained.mesh)

        def run(apply, params, batch):
            return _decode(apply, params, batch["image"])

        return decoder.collect(run, Pipeline(Records([{"image": one} for one in drawn])))

    def about(self, trained: Trained) -> dict[str, Any]:
        """What has to be known to draw the same again."""
        return {
            "sampler": repr(self.sampler),
            "steps": self.sampler.steps,
            "guidance": self.guidance.scale,
            "guided": repr(self.guidance),
            "ema": trained.averaged,
            "vae": None if self.autoencoder is None else self.autoencoder.name,
            "seed": self.seed,
        }


def _decode(apply, params, latents):
    return apply({"params": params}, latents, method="decode")
