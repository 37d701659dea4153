"""Who looks at pictures: a model of ours by its run, or one of Hugging Face's files."""

import dataclasses
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from evaluate.features import Features, pooled
from evaluate.generate import Records
from evaluate.run import Trained, restored
from evaluate.run import trained as of_run
from jaxformer import checkpoint, convert
from jaxformer.data.loader import Pipeline
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.sharding import FSDP_TENSOR


@runtime_checkable
class Encoder(Protocol):
    """Someone who looks at pictures in [0, 1]."""

    @property
    def name(self) -> str:
        """What statistics are named after."""
        ...

    def check(self) -> None:
        """Raises InputError where there is no such."""
        ...

    def load(self, mesh: Any) -> tuple[Trained, tuple[Callable, ...]]:
        """The model on the mesh, and what is done to a picture before it sees it."""
        ...


@dataclass(frozen=True)
class Run:
    """A model of ours: its config and a directory of its run, such as a classifier's.

    Pictures go through what its first evaluation does to them. `overrides` are those that
    it was trained with.
    """

    config: str
    checkpoint: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The config and the checkpoint's step."""
        step = checkpoint.steps(checkpoint.find(self.checkpoint))[-1]
        return f"{pathlib.Path(self.config).stem} at step {step}"

    def check(self) -> None:
        """Raises InputError where it has not been trained."""
        try:
            checkpoint.find(self.checkpoint)
        except InputError as error:
            raise InputError(
                f"{self.checkpoint}: no run of the model that looks at pictures is there; "
                f"first run python -m train {self.config}, or set tasks={{}}"
            ) from error

    def load(self, mesh: Any) -> tuple[Trained, tuple[Callable, ...]]:
        """The model, averaged if the run averaged it."""
        experiment = load(self.config, self.overrides)
        devices = list(mesh.devices.flat)
        _, made, params = restored(experiment, self.checkpoint, devices=devices)
        transforms = next(iter(experiment.evals.values())).transforms
        return of_run(experiment, made, params), transforms


@dataclass(frozen=True)
class Converted:
    """A model in Hugging Face's files, such as DINOv2, and what its pictures go through."""

    path: str
    transforms: tuple[Callable, ...] = ()

    @property
    def name(self) -> str:
        """The directory's name."""
        return pathlib.Path(self.path).name

    def check(self) -> None:
        """Raises InputError where there is no such directory."""
        if not (pathlib.Path(self.path) / "config.json").is_file():
            raise InputError(
                f"{self.path}: holds no config.json; give a directory as Hugging Face saves it"
            )

    def load(self, mesh: Any) -> tuple[Trained, tuple[Callable, ...]]:
        """The model."""
        model, params = convert.load(self.path, mesh=mesh)
        found = Trained(model.apply, params, mesh, FSDP_TENSOR, model=model)
        return found, self.transforms


@dataclass(frozen=True)
class Look:
    """An encoder at hand: `features` and, of a classifier, probabilities."""

    trained: Trained
    transforms: tuple[Callable, ...]
    features: Features = pooled

    def at(self, pipeline: Pipeline) -> tuple[Any, Any]:
        """Features `[N, D]` and the logits `[N, V]` of records with images in [0, 1]."""

        def both(apply, params, batch):
            return self.features(apply, params, batch), apply(
                {"params": params}, batch["image"]
            )

        return self.trained.collect(
            both, dataclasses.replace(pipeline, transforms=self.transforms)
        )

    def at_images(self, images: Float[np.ndarray, "B Y X C"]) -> tuple[Any, Any]:
        """The same of pictures."""
        return self.at(Pipeline(Records([{"image": image} for image in images])))
