"""Learning by one objective after the other: a curriculum, by the number of the step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer import metrics
from jaxformer.errors import InputError


@dataclass(frozen=True)
class Stages:
    """`stages[i]` up to step `until[i]` of the run, and the last of them after all of these.

    A step is of one stage alone, and costs what it costs. Which it is depends on nothing but
    the step's number, so that a run that goes on, or is made longer, is the same run. All
    are of one model; what is measured, and what is drawn, is the last one's.

    A model of masked diffusion that begins as a decoder has `Unmask(mask, block=1,
    shift=True)` before `Unmask(mask, shift=True)`: the same weights, which have learned by
    then what follows what (DiffuLLaMA, arXiv 2410.17891; Dream, 2508.15487).
    """

    stages: tuple[Any, ...]
    until: tuple[int, ...]

    def __post_init__(self):
        if len(self.until) != len(self.stages) - 1:
            raise InputError(
                f"until={self.until} must be one step fewer than the {len(self.stages)} "
                "stages are: the last has no end"
            )
        if list(self.until) != sorted(set(self.until)) or min(self.until, default=1) < 1:
            raise InputError(f"until={self.until} must be steps that rise, from 1 on")

    @property
    def last(self) -> Any:
        """The objective that is measured."""
        return self.stages[-1]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The last one's, which are all others'."""
        return self.last.inputs

    def arguments(self, *inputs: Array) -> tuple[Array, ...]:
        """What the model is called with."""
        return getattr(self.last, "arguments", lambda *x: x)(*inputs)

    def check(self, model: Any, pipeline: Any) -> None:
        """Raises InputError where a stage does not fit, or wants other inputs."""
        for number, stage in enumerate(self.stages):
            if stage.inputs != self.inputs:
                raise InputError(
                    f"stages.{number} is called with {', '.join(stage.inputs)}, and the last "
                    f"with {', '.join(self.inputs)}; stages are of one model"
                )
            getattr(stage, "check", lambda model, pipeline: None)(model, pipeline)

    def left_out(self, steps: int) -> str:
        """What a run of so many steps does not learn by, in a sentence; else nothing."""
        if not self.until or self.until[-1] < steps:
            return ""
        return (
            f"the last of {len(self.stages)} stages, which is what is measured, begins after "
            f"step {self.until[-1]}, and this run ends at {steps}"
        )

    def prepare(self, batch: dict, key: Array, step: Int[Array, ""]) -> dict:
        """With `stages`, the batch as each prepares it, and `stage`, whose turn it is."""
        made = []
        for stage in self.stages:
            prepare = getattr(stage, "prepare", lambda batch, key, step: batch)
            made.append(prepare(batch, key, step))
        rows = len(jax.tree.leaves(batch)[0])
        turn = (step >= jnp.asarray(self.until)).sum(dtype=jnp.int32)
        return batch | {"stages": tuple(made), "stage": jnp.full(rows, turn)}

    def loss(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """That of the stage whose turn it is, and what all of them tell; see `prepare`."""

        def of(stage, batch):
            return lambda params, key: stage.loss(apply, params, batch, key)

        made = [of(*pair) for pair in zip(self.stages, batch["stages"], strict=True)]
        told = [set(jax.eval_shape(one, params, key)[1]) for one in made]
        every = sorted(set.intersection(*told))

        def alike(one):
            def run(params, key):
                loss, found = one(params, key)
                return loss, {name: found[name] for name in every}

            return run

        turn = batch["stage"][0]
        loss, found = jax.lax.switch(turn, [alike(one) for one in made], params, key)
        return loss, found | {"stage": turn.astype(jnp.float32)}

    def measure(
        self, apply: Callable[..., Any], params: Any, batch: dict, key: Array
    ) -> metrics.Metrics:
        """The last one's."""
        return self.last.measure(apply, params, batch, key)
